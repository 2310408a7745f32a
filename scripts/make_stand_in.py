"""Makes a stand-in for ImageNet: two small archives in the same layout.

  python scripts/make_stand_in.py --out=stand_in

With it every step from the archives to a trained network can be tried without
ImageNet. Its images are JPEGs of many sizes. A class is a pattern of colored
blocks, randomly shifted and with noise, which a network can learn. The builder
of tfds labels validation images by ImageNet's own list, so that the stand-in
has the first classes of that list.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
import io
import json
from pathlib import Path
import sys
import tarfile
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bn_repro import cli, files
from bn_repro.data import imagenet_metadata
from bn_repro.errors import UserError
from bn_repro.runtime import streams


def picture(synset: str, number: int) -> bytes:
  """Returns a JPEG of a class, a function of (synset, number)."""
  label = int(synset[1:])
  pattern = np.random.Generator(np.random.Philox(key=[label, 0]))
  blocks = pattern.integers(0, 256, (4, 4, 3)).astype(np.uint8)
  rng = np.random.Generator(np.random.Philox(key=[label, number + 1]))
  width, height = (int(size) for size in rng.integers(240, 520, 2))
  image = Image.fromarray(blocks).resize(
    (int(width * 1.3), int(height * 1.3)), Image.Resampling.NEAREST
  )
  left = int(rng.integers(0, image.width - width + 1))
  top = int(rng.integers(0, image.height - height + 1))
  image = image.crop((left, top, left + width, top + height))
  noise = rng.normal(0, 20, (height, width, 1))
  pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'JPEG', quality=85)
  return file.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
  """Adds a file to an archive."""
  member = tarfile.TarInfo(name)
  member.size = len(content)
  archive.addfile(member, io.BytesIO(content))


def make_training_archive(
  path: Path, synsets: list[str], images_per_class: int
) -> None:
  """Writes a tar of one tar per class, with images `<synset>_<n>.JPEG`."""
  with tarfile.open(path, 'w') as archive:
    for synset in synsets:
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode='w') as of_class:
        for number in range(images_per_class):
          add(of_class, f'{synset}_{number}.JPEG', picture(synset, number))
      add(archive, f'{synset}.tar', inner.getvalue())


def make_validation_archive(path: Path, synsets: list[str]) -> None:
  """Writes a tar of images `ILSVRC2012_val_<n>.JPEG`, n from 1.

  Args:
    path: file to write.
    synsets: class of each image.
  """
  with tarfile.open(path, 'w') as archive:
    for position, synset in enumerate(synsets, start=1):
      # No training image has such a number.
      content = picture(synset, 1_000_000 + position)
      add(archive, f'ILSVRC2012_val_{position:08d}.JPEG', content)


# File name, label and encoded image.
Example = tuple[str, int, bytes]


def write_prepared(
  data_dir: Path, splits: Mapping[str, Iterable[Example]], num_shards: int
) -> Path:
  """Writes a copy like that of tfds's builder, without TensorFlow.

  Tests and benchmarks that do not concern the builder use it.

  Args:
    data_dir: folder in which tfds keeps data sets.
    splits: examples of each split, by its name.
    num_shards: number of shards of each split.

  Returns:
    The folder of the copy.
  """
  import tensorflow_datasets as tfds

  folder = data_dir / imagenet_metadata.NAME / imagenet_metadata.VERSION
  folder.mkdir(parents=True)
  features = tfds.features.FeaturesDict(
    {
      'file_name': tfds.features.Text(),
      'image': tfds.features.Image(encoding_format='jpeg'),
      'label': tfds.features.ClassLabel(
        num_classes=imagenet_metadata.NUM_CLASSES
      ),
    }
  )
  features.save_config(folder)
  (folder / 'label.labels.txt').write_text(
    '\n'.join(imagenet_metadata.synsets())
  )
  info = {
    'name': imagenet_metadata.NAME,
    'version': imagenet_metadata.VERSION,
    'fileFormat': 'array_record',
    'moduleName': (
      'tensorflow_datasets.datasets.imagenet2012.imagenet2012_dataset_builder'
    ),
    'splits': [
      _write_split(folder, split, list(examples), num_shards, features)
      for split, examples in splits.items()
    ],
  }
  (folder / 'dataset_info.json').write_text(json.dumps(info))
  return folder


def _write_split(
  folder: Path,
  split: str,
  examples: Sequence[Example],
  num_shards: int,
  features: Any,
) -> dict[str, Any]:
  """Writes the shards of a split; returns its entry of dataset_info.json."""
  from array_record.python import array_record_module

  cuts = [len(examples) * i // num_shards for i in range(num_shards + 1)]
  for shard in range(num_shards):
    writer = array_record_module.ArrayRecordWriter(
      str(imagenet_metadata.shard_path(folder, split, shard, num_shards)),
      'group_size:1',
    )
    for name, label, encoded in examples[cuts[shard] : cuts[shard + 1]]:
      example = {'file_name': name, 'image': encoded, 'label': label}
      writer.write(features.serialize_example(example))
    writer.close()
  return {
    'name': split,
    'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
    'numBytes': str(sum(len(encoded) for *_, encoded in examples)),
    'shardLengths': [
      str(cuts[shard + 1] - cuts[shard]) for shard in range(num_shards)
    ],
  }


def main() -> int:
  """Writes both archives; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  files.add_path_argument(
    parser,
    '--out',
    required=True,
    help='output folder',
  )
  parser.add_argument(
    '--num_validation',
    type=int,
    default=100,
    metavar='N',
    help='number of validation images, which determine the classes',
  )
  parser.add_argument(
    '--images_per_class',
    type=int,
    default=20,
    metavar='N',
    help='number of training images of each class',
  )
  try:
    flags = parser.parse_args()
  except UserError as error:
    return cli.report_user_error(error)
  validation = imagenet_metadata.validation_synsets()[: flags.num_validation]
  classes = sorted(set(validation))
  flags.out.mkdir(parents=True, exist_ok=True)
  make_training_archive(
    flags.out / 'ILSVRC2012_img_train.tar', classes, flags.images_per_class
  )
  make_validation_archive(flags.out / 'ILSVRC2012_img_val.tar', validation)
  print(
    f'{flags.out}: {len(classes) * flags.images_per_class} training images of '
    f'{len(classes)} classes, {len(validation)} validation images'
  )
  return 0


if __name__ == '__main__':
  streams.guard()
  streams.make_output_optional()
  sys.exit(main())
