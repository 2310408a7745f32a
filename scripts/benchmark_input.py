"""The input pipelines that `scripts/benchmark.py input` compares.

  python scripts/benchmark_input.py PIPELINE FOLDER

FOLDER holds the same photographs as JPEG, ArrayRecord and TFRecord. For each
number N on standard input, the pipeline makes N training batches of 224 x 224
pixels, and a line of JSON gives the seconds they took: of wall time, and of CPU
time over all cores. For the line `views` it saves the pixels of the boxes in
FOLDER/boxes.json to FOLDER/PIPELINE.npy.

  python scripts/benchmark_input.py stream FOLDER BATCHES

prints the time to the first batch and the memory in use, for `benchmark.py
stream`.
"""

from collections.abc import Callable, Iterator
import io
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZE = 224
BATCH_SIZE = 128
# Mean and standard deviation of ImageNet's pixels, by channel, as torchvision
# and Flax's example have them.
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)

# (left, top, width, height) of each image.
Boxes = list[tuple[int, int, int, int]]


class Ours:
  """The pipeline of this repository."""

  def __init__(self, folder: Path, batch_size: int = BATCH_SIZE):
    from bn_repro import config as config_lib
    from bn_repro.data import datasets

    self._config = config_lib.load(
      str(ROOT / 'configs/bn_x5.py'),
      (
        f'data.data_dir={folder}',
        'data.name=imagenet_stand_in',
        f'batch_size={batch_size}',
      ),
    )
    self._train = datasets.load(self._config.data, 0).splits['train']

  def batches(self, count: int) -> Iterator[Any]:
    """Training batches."""
    from bn_repro.data import input_pipeline

    order = input_pipeline.create_order(self._config, len(self._train))
    return input_pipeline.train_batches(
      self._train, order, self._config.batch_size, 0, count
    )

  def views(self, images: list[bytes], boxes: Boxes) -> np.ndarray:
    """Returns the pixels of a box of each image, uint8 (n, SIZE, SIZE, 3)."""
    from bn_repro.data import crops, jpeg

    out = np.empty((len(images), SIZE, SIZE, 3), np.uint8)
    for encoded, box, pixels in zip(images, boxes, out, strict=True):
      jpeg.decode_view(encoded, lambda *_, box=box: crops.Box(*box), pixels)
    return out


class DecodeOnly(Ours):
  """`Ours` without resizing and mirroring: the upper limit of its rate."""

  def batches(self, count: int) -> Iterator[Any]:
    """Batches whose images are decoded and thrown away."""
    from bn_repro.data import jpeg

    def decode(
      encoded: bytes, choose_box: Callable[..., Any], out: np.ndarray
    ) -> None:
      jpeg.decode_jpeg(encoded, choose_box, len(out))

    jpeg.decode_view = decode
    return super().batches(count)


class TfData:
  """tf.data, as Flax's ImageNet example uses it."""

  def __init__(self, folder: Path):
    import tensorflow as tf

    self._tf = tf
    self._files = [str(path) for path in sorted(folder.glob('*.tfrecord'))]

  def batches(self, count: int) -> Iterator[Any]:
    """Batches of normalised float32 images."""
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

  def views(self, images: list[bytes], boxes: Boxes) -> np.ndarray:
    """Returns the pixels of a box of each image, uint8 (n, SIZE, SIZE, 3)."""
    pixels = [
      self._view(encoded, [top, left, height, width]).numpy()
      for encoded, (left, top, width, height) in zip(images, boxes, strict=True)
    ]
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


_photographs: list[bytes] = []
_shared_batches: list[np.ndarray] = []


def _fill_by_pillow(number: int) -> int:
  """Makes a batch in a worker process, as torchvision; returns its number."""
  from PIL import Image

  from bn_repro.data import crops

  rng = np.random.default_rng(number)
  for out in _shared_batches[number]:
    encoded = _photographs[rng.integers(len(_photographs))]
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
    _photographs.extend(
      path.read_bytes() for path in sorted(folder.glob('*.jpg'))
    )

  def batches(self, count: int) -> Iterator[Any]:
    """Batches of normalised float32 images, in shared memory."""
    shape = (BATCH_SIZE, 3, SIZE, SIZE)
    while len(_shared_batches) < count:
      memory = mmap.mmap(-1, 4 * math.prod(shape))
      batch = np.frombuffer(memory, np.float32).reshape(shape)
      _shared_batches.append(batch)
    with multiprocessing.get_context('fork').Pool(2) as pool:
      for number in pool.imap(_fill_by_pillow, range(count)):
        yield _shared_batches[number]
      pool.close()
      pool.join()

  def views(self, images: list[bytes], boxes: Boxes) -> np.ndarray:
    """Returns the pixels of a box of each image, uint8 (n, SIZE, SIZE, 3)."""
    from PIL import Image

    return np.stack(
      [
        np.asarray(
          Image.open(io.BytesIO(encoded)).resize(
            (SIZE, SIZE),
            Image.Resampling.BILINEAR,
            (left, top, left + width, top + height),
          )
        )
        for encoded, (left, top, width, height) in zip(
          images, boxes, strict=True
        )
      ]
    )


PIPELINES: dict[str, Any] = {
  'ours': Ours,
  'tf.data': TfData,
  'pillow': Pillow,
  'decode only': DecodeOnly,
}


def _cpu_seconds() -> float:
  """CPU time of this process and of its children that have ended."""
  usages = [
    resource.getrusage(who)
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  ]
  return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def follow_stream(folder: Path, num_batches: int) -> None:
  """Prints the seconds to the first batch, then resident memory twice."""
  start = time.perf_counter()
  batches = Ours(folder, batch_size=256).batches(num_batches)
  marks = {num_batches // 10, num_batches}
  for number, _ in enumerate(batches, start=1):
    if number == 1:
      print(json.dumps({'first': time.perf_counter() - start}), flush=True)
    if number in marks:
      pages = int(Path('/proc/self/statm').read_text().split()[1])
      print(
        json.dumps(
          {'batches': number, 'bytes': pages * os.sysconf('SC_PAGESIZE')}
        ),
        flush=True,
      )


def main() -> None:
  """Runs a pipeline on the commands of standard input."""
  name, folder = sys.argv[1], Path(sys.argv[2])
  if name == 'stream':
    follow_stream(folder, int(sys.argv[3]))
    return
  pipeline = PIPELINES[name](folder)
  for line in sys.stdin:
    if line.strip() == 'views':
      images = [path.read_bytes() for path in sorted(folder.glob('*.jpg'))]
      boxes = json.loads((folder / 'boxes.json').read_text())
      np.save(folder / f'{name}.npy', pipeline.views(images, boxes))
      print('{}', flush=True)
      continue
    cpu, wall = _cpu_seconds(), time.perf_counter()
    count = int(line)
    made = sum(1 for _ in pipeline.batches(count))
    assert made == count
    print(
      json.dumps(
        {
          'cpu': _cpu_seconds() - cpu,
          'wall': time.perf_counter() - wall,
          'images': made * BATCH_SIZE,
        }
      ),
      flush=True,
    )


if __name__ == '__main__':
  main()
