"""A small ImageNet, written as tfds prepares it but without TensorFlow."""

import make_stand_in

from bn_repro.data import imagenet_metadata

NUM_SHARDS = 4


def examples(num_train=40, num_validation=10):
  """File name, label and JPEG of each image, by split."""
  labels = {s: label for label, s in enumerate(imagenet_metadata.synsets())}
  of_validation = imagenet_metadata.validation_synsets()[:num_validation]
  classes = sorted(set(of_validation))

  def example(name, synset, number):
    return name, labels[synset], make_stand_in.picture(synset, number)

  train = [(classes[i % len(classes)], i) for i in range(num_train)]
  return {
    'train': [example(f'{s}_{i}.JPEG', s, i) for s, i in train],
    'validation': [
      example(f'ILSVRC2012_val_{i:08}.JPEG', s, 10_000 + i)
      for i, s in enumerate(of_validation, start=1)
    ],
  }


def write(data_dir, splits):
  """Writes a copy; returns its folder."""
  return make_stand_in.write_prepared(data_dir, splits, NUM_SHARDS)


def shard_path(data_dir, split, shard):
  folder = data_dir / imagenet_metadata.NAME / imagenet_metadata.VERSION
  return imagenet_metadata.shard_path(folder, split, shard, NUM_SHARDS)
