"""A small copy of ImageNet as tfds leaves it, written without TensorFlow."""

import make_stand_in

from bn_repro.data import imagenet, imagenet_metadata

NUM_SHARDS = 4


def examples(num_train=40, num_validation=10):
  """Names, labels and pictures of both splits, few of every class."""
  labels = {s: label for label, s in enumerate(imagenet_metadata.synsets())}
  of_validation = imagenet_metadata.validation_synsets()[:num_validation]
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
  folder = data_dir / imagenet_metadata.NAME / imagenet.VERSION
  return imagenet.shard_path(folder, split, shard, NUM_SHARDS)
