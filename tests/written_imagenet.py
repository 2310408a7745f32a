"""A small copy of ImageNet as tfds leaves it, written without TensorFlow."""

from pathlib import Path
import sys

from bn_repro import ilsvrc2012, imagenet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'scripts'))

import make_stand_in

NUM_SHARDS = 4


def examples(num_train=40, num_validation=10):
  """Names, labels and pictures of both splits, few of every class."""
  labels = {s: label for label, s in enumerate(ilsvrc2012.synsets())}
  of_validation = ilsvrc2012.validation_synsets()[:num_validation]
  classes = sorted(set(of_validation))
  train = [(classes[i % len(classes)], i) for i in range(num_train)]
  return {
    'train': [
      (f'{s}_{i}.JPEG', labels[s], make_stand_in.picture(s, i))
      for s, i in train
    ],
    'validation': [
      (
        f'ILSVRC2012_val_{i:08}.JPEG',
        labels[s],
        make_stand_in.picture(s, 10_000 + i),
      )
      for i, s in enumerate(of_validation, start=1)
    ],
  }


def write(data_dir, splits):
  return make_stand_in.write_prepared(data_dir, splits, NUM_SHARDS)


def shard_path(data_dir, split, shard):
  folder = data_dir / ilsvrc2012.NAME / imagenet.VERSION
  return imagenet.shard_path(folder, split, shard, NUM_SHARDS)
