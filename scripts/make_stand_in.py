"""Makes a stand-in for ImageNet: two small archives in the real ones' layout.

  python scripts/make_stand_in.py --out=stand_in

For tests and trials of the whole road from the archives to training, where
ImageNet itself is not. The images are JPEGs of many sizes whose class can be
learnt: a class is a pattern of coloured blocks, seen from here or there and in
noise. The builder of tfds gives a validation image the class that ImageNet's
own list has at its position, so that the pictures follow that list, and the
training classes are those that it names first.
"""

import argparse
from collections.abc import Iterable, Mapping
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

from bn_repro.data import imagenet, imagenet_metadata


def picture(synset: str, number: int) -> bytes:
  """A JPEG of a class; a function of (synset, number)."""
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
  """A tar of a tar a class, each with `<synset>_<n>.JPEG`."""
  with tarfile.open(path, 'w') as archive:
    for synset in synsets:
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode='w') as of_class:
        for number in range(images_per_class):
          add(of_class, f'{synset}_{number}.JPEG', picture(synset, number))
      add(archive, f'{synset}.tar', inner.getvalue())


def make_validation_archive(path: Path, synsets: list[str]) -> None:
  """A tar of `ILSVRC2012_val_%08d.JPEG`, the n-th of the n-th class named."""
  with tarfile.open(path, 'w') as archive:
    for position, synset in enumerate(synsets, start=1):
      # Numbers that no training image has.
      content = picture(synset, 1_000_000 + position)
      add(archive, f'ILSVRC2012_val_{position:08d}.JPEG', content)


# Name, label and encoded image.
Example = tuple[str, int, bytes]


def write_prepared(
  data_dir: Path, splits: Mapping[str, Iterable[Example]], num_shards: int
) -> Path:
  """Writes what the builder of tfds would leave, without TensorFlow.

  For tests and benchmarks that are not about the builder.

  Args:
    data_dir: where tfds keeps its data sets.
    splits: examples by name of the split.
    num_shards: of each split.

  Returns:
    The folder of the data set.
  """
  from array_record.python import array_record_module
  import tensorflow_datasets as tfds

  folder = data_dir / imagenet_metadata.NAME / imagenet.VERSION
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
  infos: list[dict[str, Any]] = []
  for split, examples in splits.items():
    examples = list(examples)
    cuts = [len(examples) * i // num_shards for i in range(num_shards + 1)]
    for shard in range(num_shards):
      writer = array_record_module.ArrayRecordWriter(
        str(imagenet.shard_path(folder, split, shard, num_shards)),
        'group_size:1',
      )
      for name, label, encoded in examples[cuts[shard] : cuts[shard + 1]]:
        writer.write(
          features.serialize_example(
            {'file_name': name, 'image': encoded, 'label': label}
          )
        )
      writer.close()
    infos.append(
      {
        'name': split,
        'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        'numBytes': str(sum(len(encoded) for *_, encoded in examples)),
        'shardLengths': [
          str(cuts[shard + 1] - cuts[shard]) for shard in range(num_shards)
        ],
      }
    )
  info = {
    'name': imagenet_metadata.NAME,
    'version': imagenet.VERSION,
    'fileFormat': 'array_record',
    'moduleName': (
      'tensorflow_datasets.datasets.imagenet2012.imagenet2012_dataset_builder'
    ),
    'splits': infos,
  }
  (folder / 'dataset_info.json').write_text(json.dumps(info))
  return folder


def main() -> None:
  """Writes both archives."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--out', type=Path, required=True, metavar='DIR')
  parser.add_argument('--num_validation', type=int, default=100)
  parser.add_argument('--images_per_class', type=int, default=20)
  flags = parser.parse_args()
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


if __name__ == '__main__':
  main()
