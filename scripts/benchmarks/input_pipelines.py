"""The input pipelines that `scripts/benchmark.py input` compares.

  python scripts/benchmarks/input_pipelines.py PIPELINE FOLDER

FOLDER holds the same photographs as JPEG, ArrayRecord and TFRecord files. For
each number N on standard input, the pipeline makes N training batches of 224 x
224 pixels and prints a line of JSON: the number of images, and the wall time
and the CPU time of all cores in seconds. For the line `views` it resizes the
boxes of FOLDER/boxes.json and saves the pixels as FOLDER/PIPELINE.npy. For the
line `budget`, the pipeline `ours` answers with the microseconds of each of its
parts per image.

  python scripts/benchmarks/input_pipelines.py tfrecord FOLDER
  python scripts/benchmarks/input_pipelines.py stream FOLDER BATCHES

The first command writes the TFRecord file. The second prints the time to the
first batch and the resident memory, for `benchmark.py stream`.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
from pathlib import Path
import resource
import sys
import time
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

# The environment of TensorFlow lacks what the other pipelines need: they import
# it themselves.
from bn_repro.data import crops, imagenet_metadata

SIZE = 224
BATCH_SIZE = 128
# Mean and standard deviation of ImageNet's pixels per channel, as in
# torchvision and in Flax's example.
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)


# Encoded images, and a box in each of them.
Photographs = Sequence[tuple[bytes, crops.Box]]


def write_photographs(folder: Path) -> None:
  """Writes three batches of JPEGs of 500 x 375 pixels, about ImageNet's size.

  The same images are also written as a prepared copy of ImageNet, and a random
  box of each as boxes.json.
  """
  photographs = list(itertools.islice(_photographs(), 3 * BATCH_SIZE))
  encoded = [image for image, _ in photographs]
  for number, image in enumerate(encoded):
    (folder / f'{number:04}.jpg').write_bytes(image)
  boxes = json.dumps([box for _, box in photographs])
  (folder / 'boxes.json').write_text(boxes)
  mean = sum(map(len, encoded)) / len(encoded)
  print(f'{len(encoded)} photographs of {mean / 1e3:.0f} kB')
  write_imagenet(folder, encoded, encoded[:1], num_shards=1)


def _photographs() -> Iterator[tuple[bytes, crops.Box]]:
  """Yields random crops of three photos as JPEGs, and a random box in each.

  Two of the photos are scikit-learn's and one is Matplotlib's. The scale is
  between the one at which a photo just fills the crop, and 1.25 times that.
  """
  import matplotlib as mpl
  from sklearn.datasets import load_sample_images

  photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
  hopper = Path(mpl.get_data_path(), 'sample_data/grace_hopper.jpg')
  photos.append(Image.open(hopper).convert('RGB'))
  rng = np.random.default_rng(0)
  for photo in itertools.cycle(photos):
    scale = max(500 / photo.width, 375 / photo.height) * rng.uniform(1, 1.25)
    width, height = (math.ceil(scale * side) for side in photo.size)
    left, top = rng.integers(0, (width - 499, height - 374))
    image = photo.resize((width, height), Image.Resampling.BICUBIC).crop(
      (left, top, left + 500, top + 375)
    )
    box = crops.random_box(*image.size, rng.random(crops.NUM_DRAWS))
    yield _encode(image, quality=95), box


def tiny_image() -> bytes:
  """Returns a JPEG of 64 x 48 pixels."""
  import make_stand_in

  picture = make_stand_in.picture(imagenet_metadata.synsets()[0], 0)
  return _encode(Image.open(io.BytesIO(picture)).resize((64, 48)), quality=75)


def _encode(image: Image.Image, quality: int) -> bytes:
  file = io.BytesIO()
  image.save(file, 'JPEG', quality=quality)
  return file.getvalue()


def write_imagenet(
  folder: Path,
  train: Iterable[bytes],
  validation: Iterable[bytes],
  num_shards: int,
) -> None:
  """Writes images as a prepared copy of ImageNet.

  Args:
    folder: value of `data.data_dir`.
    train: encoded training images, which get the classes in turn.
    validation: encoded validation images, at most 50,000, which get the classes
      of ImageNet's list.
    num_shards: number of shards per split.
  """
  import make_stand_in

  synsets = imagenet_metadata.synsets()
  labels = {synset: label for label, synset in enumerate(synsets)}
  of_validation = imagenet_metadata.validation_synsets()
  make_stand_in.write_prepared(
    folder,
    {
      'train': (
        (f'{synsets[i % len(synsets)]}_{i}.JPEG', i % len(synsets), encoded)
        for i, encoded in enumerate(train)
      ),
      'validation': (
        (f'ILSVRC2012_val_{i + 1:08}.JPEG', labels[of_validation[i]], encoded)
        for i, encoded in enumerate(validation)
      ),
    },
    num_shards,
  )


def _load_photographs(folder: Path) -> Photographs:
  boxes = json.loads((folder / 'boxes.json').read_text())
  return [
    (path.read_bytes(), crops.Box(*box))
    for path, box in zip(sorted(folder.glob('*.jpg')), boxes, strict=True)
  ]


def antialiased_views(folder: Path) -> np.ndarray:
  """Resizes the boxes bicubically with Pillow, which filters before it samples.

  Returns:
    uint8 (images, SIZE, SIZE, 3).
  """
  return _resize(_load_photographs(folder), Image.Resampling.BICUBIC)


def _resize(photographs: Photographs, method: Image.Resampling) -> np.ndarray:
  views = [
    Image.open(io.BytesIO(encoded)).resize((SIZE, SIZE), method, box.corners)
    for encoded, box in photographs
  ]
  return np.stack([np.asarray(view) for view in views])


class Ours:
  """The pipeline of this repository."""

  def __init__(self, folder: Path, batch_size: int = BATCH_SIZE):
    from bn_repro import config as config_lib
    from bn_repro.data import datasets

    self._config = config_lib.load(
      'bn_x5',
      (
        f'data.data_dir={folder}',
        'data.name=imagenet_stand_in',
        f'batch_size={batch_size}',
      ),
    )
    self._train = datasets.load(self._config.data, 0).splits['train']

  def batches(self, count: int) -> Iterator[Any]:
    """Returns training batches of uint8 images."""
    from bn_repro.data import input_pipeline

    order = input_pipeline.create_order(self._config, len(self._train))
    return input_pipeline.train_batches(
      self._train, order, self._config.batch_size, 0, count
    )

  def views(self, photographs: Photographs) -> np.ndarray:
    """Resizes the boxes; returns uint8 (images, SIZE, SIZE, 3)."""
    from bn_repro.data import jpeg

    out = np.empty((len(photographs), SIZE, SIZE, 3), np.uint8)
    for (encoded, box), pixels in zip(photographs, out, strict=True):
      jpeg.decode_view(encoded, lambda *_, box=box: box, pixels, as_shown=False)
    return out

  def budget(self) -> dict[str, float]:
    """Returns microseconds of CPU time per image: of each part, and of all.

    Parts are measured one after another in this thread; each is the shortest of
    five times.
    """
    import cv2

    from bn_repro.data import jpeg

    split: Any = self._train
    indices = range(len(split))
    random = crops.CropRandomness(0, np.arange(len(split)))
    draws = random.draws()
    encoded = [split.source[i]['image'] for i in indices]
    out = np.empty((SIZE, SIZE, 3), np.uint8)

    def decode(index: int) -> np.ndarray | None:
      return jpeg.decode_jpeg(
        encoded[index],
        lambda width, height: crops.random_box(width, height, draws[index]),
        SIZE,
        as_shown=False,
      )

    def resize() -> None:
      for pixels in decoded:
        jpeg.resize(pixels, out)

    decoded = [pixels for i in indices if (pixels := decode(i)) is not None]
    mirrored = [i for i in indices if crops.is_mirrored(draws[i])]
    parts: dict[str, Callable[[], Any]] = {
      'read': lambda: [split.source[i] for i in indices],
      'random numbers': random.draws,
      'decode': lambda: [decode(i) for i in indices],
      'resize': resize,
      'mirror': lambda: [cv2.flip(out, 1, out) for _ in mirrored],
    }

    def microseconds(part: Callable[[], Any]) -> float:
      times = []
      for _ in range(5):
        start = time.thread_time_ns()
        part()
        times.append(time.thread_time_ns() - start)
      return min(times) / 1e3 / len(split)

    budget = {name: microseconds(part) for name, part in parts.items()}
    measure(self, 3)  # Warms up.
    whole = measure(self, 9)
    return {**budget, 'all': 1e6 * whole['cpu'] / whole['images']}


class DecodeOnly(Ours):
  """`Ours` without resizing and mirroring: the upper limit of its rate."""

  def batches(self, count: int) -> Iterator[Any]:
    """Returns batches whose images are decoded and discarded."""
    from bn_repro.data import jpeg

    def decode(
      encoded: bytes,
      choose_box: Callable[..., Any],
      out: np.ndarray,
      *,
      as_shown: bool,
    ) -> None:
      jpeg.decode_jpeg(encoded, choose_box, len(out), as_shown=as_shown)

    jpeg.decode_view = decode
    return super().batches(count)


class TfData:
  """tf.data, as Flax's ImageNet example uses it."""

  def __init__(self, folder: Path):
    import tensorflow as tf

    self._tf = tf
    self._files = [str(path) for path in folder.glob('*.tfrecord')]

  def batches(self, count: int) -> Iterator[Any]:
    """Returns batches of normalized float32 images."""
    tf = self._tf
    features = {
      'image': tf.io.FixedLenFeature([], tf.string),
      'label': tf.io.FixedLenFeature([], tf.int64),
    }

    def load(record: Any) -> Any:
      example = tf.io.parse_single_example(record, features)
      begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.io.extract_jpeg_shape(example['image']),
        bounding_boxes=tf.zeros([1, 0, 4]),
        min_object_covered=0.1,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
      )
      window = tf.concat([begin[:2], size[:2]], 0)
      image = self._view(example['image'], window)
      image = tf.image.random_flip_left_right(image)
      image = (image - MEAN) / STD
      return image, example['label']

    data = tf.data.TFRecordDataset(self._files).repeat()
    data = data.map(load, num_parallel_calls=tf.data.AUTOTUNE)
    data = data.batch(BATCH_SIZE, drop_remainder=True).prefetch(10)
    return iter(data.take(count).as_numpy_iterator())

  def _view(self, encoded: Any, window: Any) -> Any:
    tf = self._tf
    image = tf.io.decode_and_crop_jpeg(encoded, window, channels=3)
    return tf.image.resize(image, (SIZE, SIZE), tf.image.ResizeMethod.BICUBIC)

  def views(self, photographs: Photographs) -> np.ndarray:
    """Resizes the boxes; returns uint8 (images, SIZE, SIZE, 3)."""
    pixels = [
      self._view(encoded, [box.top, box.left, box.height, box.width]).numpy()
      for encoded, box in photographs
    ]
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


# What the worker processes of `Pillow` inherit.
_images: list[bytes] = []
_shared_batches: list[np.ndarray] = []


def _fill_batch(number: int) -> int:
  """Fills a shared batch as torchvision does; returns its number."""
  rng = np.random.default_rng(number)
  for out in _shared_batches[number]:
    encoded = _images[rng.integers(len(_images))]
    image = Image.open(io.BytesIO(encoded)).convert('RGB')
    draws = rng.random(crops.NUM_DRAWS)
    box = crops.random_box(*image.size, draws)
    image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box.corners)
    if crops.is_mirrored(draws):
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    out[:] = np.asarray(image).transpose(2, 0, 1)
    out -= MEAN[:, None, None]
    out /= STD[:, None, None]
  return number


class Pillow:
  """Pillow in two worker processes, as PyTorch's data loader uses it."""

  def __init__(self, folder: Path):
    _images.extend(encoded for encoded, _ in _load_photographs(folder))

  def batches(self, count: int) -> Iterator[Any]:
    """Yields batches of normalized float32 images, in shared memory."""
    shape = (BATCH_SIZE, 3, SIZE, SIZE)
    while len(_shared_batches) < count:
      memory = mmap.mmap(-1, 4 * math.prod(shape))
      batch = np.frombuffer(memory, np.float32).reshape(shape)
      _shared_batches.append(batch)
    with multiprocessing.get_context('fork').Pool(2) as pool:
      for number in pool.imap(_fill_batch, range(count)):
        yield _shared_batches[number]
      pool.close()
      pool.join()

  def views(self, photographs: Photographs) -> np.ndarray:
    """Resizes the boxes; returns uint8 (images, SIZE, SIZE, 3)."""
    return _resize(photographs, Image.Resampling.BILINEAR)


PIPELINES: dict[str, Any] = {
  'ours': Ours,
  'tf.data': TfData,
  'pillow': Pillow,
  'decode only': DecodeOnly,
}


def write_tfrecord(folder: Path) -> None:
  """Writes the photographs as one TFRecord file, in the format of tfds."""
  import tensorflow as tf

  with tf.io.TFRecordWriter(str(folder / 'photographs.tfrecord')) as writer:
    for encoded, _ in _load_photographs(folder):
      image = tf.train.BytesList(value=[encoded])
      label = tf.train.Int64List(value=[0])
      feature = {
        'image': tf.train.Feature(bytes_list=image),
        'label': tf.train.Feature(int64_list=label),
      }
      features = tf.train.Features(feature=feature)
      writer.write(tf.train.Example(features=features).SerializeToString())


def follow_stream(folder: Path, num_batches: int) -> None:
  """Reads a stream of batches of 256, and prints three lines of JSON.

  These are the seconds to the first batch, and the bytes of resident memory
  after a tenth of the batches and after all of them.
  """
  start = time.perf_counter()
  batches = Ours(folder, batch_size=256).batches(num_batches)
  for number, _ in enumerate(batches, start=1):
    if number == 1:
      print(json.dumps({'first': time.perf_counter() - start}), flush=True)
    if number in (num_batches // 10, num_batches):
      pages = int(Path('/proc/self/statm').read_text().split()[1])
      num_bytes = pages * os.sysconf('SC_PAGESIZE')
      print(json.dumps({'bytes': num_bytes}), flush=True)


def _cpu_seconds() -> float:
  """Returns the CPU time of this process and of its children that exited."""
  usages = [
    resource.getrusage(who)
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  ]
  return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(pipeline: Any, num_batches: int) -> dict[str, float]:
  """Makes batches; returns their images, wall time and CPU time."""
  cpu, wall = _cpu_seconds(), time.perf_counter()
  made = sum(1 for _ in pipeline.batches(num_batches))
  assert made == num_batches
  return {
    'images': made * BATCH_SIZE,
    'wall': time.perf_counter() - wall,
    'cpu': _cpu_seconds() - cpu,
  }


def main() -> None:
  """Runs the command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('name', choices=(*PIPELINES, 'tfrecord', 'stream'))
  parser.add_argument('folder', type=Path)
  parser.add_argument('batches', nargs='?', type=int, default=1)
  flags = parser.parse_args()
  name, folder = flags.name, flags.folder
  if name == 'tfrecord':
    write_tfrecord(folder)
    print('{}', flush=True)
    return
  if name == 'stream':
    follow_stream(folder, flags.batches)
    return
  pipeline = PIPELINES[name](folder)
  for line in sys.stdin:
    answer: dict[str, float] = {}
    if line.strip() == 'views':
      views = pipeline.views(_load_photographs(folder))
      np.save(folder / f'{name}.npy', views)
    elif line.strip() == 'budget':
      answer = pipeline.budget()
    else:
      answer = measure(pipeline, int(line))
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
