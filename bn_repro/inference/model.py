"""A trained network: images in, probabilities of the classes out.

  import bn_repro
  model = bn_repro.load('runs/bn_x5')
  probabilities = model.predict(['cat.jpg', 'dog.png'])

A model knows its preprocessing, its classes and its BN statistics. It needs
neither the training data nor the code of a run.
"""

import collections
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
import dataclasses
import functools
import itertools
import os
from pathlib import Path
import time

import jax
import numpy as np

from bn_repro import files, host
from bn_repro.data import crops, datasets, jpeg
from bn_repro.errors import UserError
from bn_repro.inference import forward
from bn_repro.inference.crops import convert_channels
from bn_repro.models import factory
from bn_repro.runtime import mirror
from bn_repro.runtime.workdir import Workdir
from bn_repro.training import model_file

# A path of an image, or uint8 (height, width[, 1 or 3]).
Image = str | os.PathLike[str] | np.ndarray

# Images of a call of the network. Our choice: larger batches are no faster on a
# CPU, and take more memory.
BATCH_SIZE = 32
# Batches that threads decode ahead of the network.
_BATCHES_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a network says about one image.

  Attributes:
    name: the path of the image, or 'image 3' for the fourth array.
    pixels: uint8 (height, width, channels) that the network saw.
    probabilities: float32 (classes,); they add up to 1.
    error: why the image could not be decoded; the others are then None.
  """

  name: str
  pixels: np.ndarray | None
  probabilities: np.ndarray | None
  error: str = ''


class Model:
  """A trained network with its preprocessing, classes and statistics.

  Attributes:
    file: the variables, the config and the facts of the network.
    waited: seconds in which the network waited for images, in the last call of
      `predictions`.
  """

  def __init__(self, file: model_file.ModelFile):
    """Places the variables on the devices.

    Args:
      file: what `model_file.read` returns.

    Raises:
      UserError: if the variables are not those of the network, or the network
        computes in float64 and JAX is not set up for it.
    """
    has_x64 = jax.config.read('jax_enable_x64')
    if file.config.model.dtype == 'float64' and not has_x64:
      raise UserError(
        'model.dtype=float64: set JAX_ENABLE_X64=1, or call '
        "jax.config.update('jax_enable_x64', True), before you load the model"
      )
    self.file = file
    self.waited = 0.0
    network = factory.create_model(
      file.config.model, file.config.bn, len(file.label_names)
    )
    problems = model_file.mismatches(
      factory.variable_shapes(network, file.image_shape), file.variables
    )
    if problems:
      raise UserError(
        *(f'not the variables of its config: {line}' for line in problems)
      )
    self._forward = forward.create_predict(file)

  @property
  def label_names(self) -> tuple[str, ...]:
    """Name of each class, by label."""
    return tuple(self.file.label_names)

  def predict(self, images: Image | Iterable[Image]) -> np.ndarray:
    """Computes the probabilities of images.

    Args:
      images: a path, an array, or any number of either. An array is uint8
        (height, width[, 1 or 3]) in RGB, or a batch of them with a leading axis
        (batch, height, width, 1 or 3).

    Returns:
      float32 (images, classes), in the order of the images.

    Raises:
      UserError: if an image cannot be decoded.
    """
    rows = []
    for prediction in self.predictions(images):
      if prediction.error:
        raise UserError(f'{prediction.name}: {prediction.error}')
      rows.append(prediction.probabilities)
    return np.array(rows, np.float32).reshape(-1, len(self.label_names))

  def predictions(
    self, images: Image | Iterable[Image]
  ) -> Iterator[Prediction]:
    """Yields a prediction for each image, in order.

    Threads decode the next images while the network computes.

    Args:
      images: as for `predict`.
    """
    num_threads = host.num_cores()
    self.waited = 0.0
    numbered = enumerate(_as_iterable(images))
    with ThreadPoolExecutor(num_threads, thread_name_prefix='decode') as pool:

      def start_batch() -> list[Future[Prediction]]:
        images = itertools.islice(numbered, BATCH_SIZE)
        return [pool.submit(self._decode, *image) for image in images]

      ahead = collections.deque(start_batch() for _ in range(_BATCHES_AHEAD))
      while batch := ahead.popleft():
        ahead.append(start_batch())
        before = time.perf_counter()
        decoded = [future.result() for future in batch]
        self.waited += time.perf_counter() - before
        yield from self._predict_batch(decoded)

  def _predict_batch(self, decoded: list[Prediction]) -> list[Prediction]:
    """Fills in probabilities; the batch is padded to one of two sizes."""
    good = [image.pixels for image in decoded if image.pixels is not None]
    if not good:
      return decoded
    size = 1 if len(good) == 1 else BATCH_SIZE
    padding = np.zeros((size - len(good), *self.file.image_shape), np.uint8)
    pixels = np.concatenate([np.stack(good), padding])
    rows = iter(np.asarray(self._forward(pixels)))
    return [
      image
      if image.pixels is None
      else dataclasses.replace(image, probabilities=next(rows))
      for image in decoded
    ]

  def _decode(self, number: int, image: Image) -> Prediction:
    name = f'image {number}' if isinstance(image, np.ndarray) else str(image)
    try:
      pixels = self.preprocess(image)
    except (jpeg.UndecodableImage, OSError) as error:
      reason = error.strerror if isinstance(error, OSError) else error
      return Prediction(name, None, None, f'cannot be decoded: {reason}')
    return Prediction(name, pixels, None)

  def preprocess(self, image: Image) -> np.ndarray:
    """Returns the pixels that the network sees, as in its evaluation.

    For a network of cropped images it is the box `data.evaluation_box`. For one
    of whole images, such as digits, it is the largest central box of their
    aspect ratio, resized to their size if it has another one, made gray if they
    are, and padded.

    Args:
      image: a path, or uint8 (height, width[, 1 or 3]) in RGB.

    Returns:
      uint8 (height, width, channels) of `file.image_shape`.

    Raises:
      UndecodableImage: if the file is not a sound image.
      OSError: if the file cannot be read.
      ValueError: if the array has another dtype or shape.
    """
    data = self.file.config.data
    unpadded = self.file.unpadded_shape
    if unpadded is None:
      return _evaluation_view(
        image,
        crops.EVALUATION_BOXES[data.evaluation_box],
        self.file.image_shape,
      )
    choose_box = functools.partial(crops.largest_box, *unpadded)
    pixels = _resized_box(image, choose_box, unpadded)
    pixels = convert_channels(pixels, self.file.image_shape[-1])
    return datasets.binarize_and_pad(pixels[None], data)[0]


def load(path: str | os.PathLike[str]) -> Model:
  """Loads a trained network.

  Args:
    path: workdir of a run, or a model file.

  Returns:
    The network, with the parameters and the population statistics of the last
    evaluation of its run.

  Raises:
    UserError: if there is no model, or it is damaged.
  """
  return Model(model_file.read(find(path)))


def find(path: str | os.PathLike[str]) -> Path:
  """Returns the model file of a workdir, or the path of a model file itself.

  Raises:
    UserError: if there is none.
  """
  path = files.expand('--model', os.fspath(path), in_bucket=True)
  found = mirror.fetch(path, ['', model_file.NAME])
  return Workdir(found).require_model() if found.is_dir() else found


def _as_iterable(images: Image | Iterable[Image]) -> Iterable[Image]:
  if isinstance(images, str | os.PathLike):
    return [images]
  if isinstance(images, np.ndarray) and images.ndim < 4:
    return [images]
  return images


def _evaluation_view(
  image: Image, choose_box: crops.ChooseBox, shape: tuple[int, int, int]
) -> np.ndarray:
  """Returns the box of an image that evaluation sees, of a file or an array."""
  out = np.empty(shape, np.uint8)
  if isinstance(image, np.ndarray):
    jpeg.resize(_cut(_as_rgb(image), choose_box), out)
  else:
    encoded = Path(image).read_bytes()
    jpeg.decode_view(encoded, choose_box, out, as_shown=True)
  return out


def _resized_box(
  image: Image, choose_box: crops.ChooseBox, shape: tuple[int, int]
) -> np.ndarray:
  """Returns a box of an image, resized to (height, width) if it differs."""
  if isinstance(image, np.ndarray):
    pixels = _as_rgb(image)
  else:
    pixels = jpeg.decode_image(
      Path(image).read_bytes(), 2 * max(shape), as_shown=True
    )
  pixels = _cut(pixels, choose_box)
  if pixels.shape[:2] == shape:
    return pixels
  out = np.empty((*shape, 3), np.uint8)
  jpeg.resize(pixels, out)
  return out


def _cut(pixels: np.ndarray, choose_box: crops.ChooseBox) -> np.ndarray:
  left, top, right, bottom = choose_box(*pixels.shape[1::-1]).corners
  return pixels[top:bottom, left:right]


def _as_rgb(image: np.ndarray) -> np.ndarray:
  """Returns uint8 (height, width, 3)."""
  if image.ndim == 2:
    image = image[..., None]
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
    raise ValueError(
      f'an image must be uint8 (height, width[, 1 or 3]), not {image.dtype} '
      f'{image.shape}'
    )
  return np.broadcast_to(image, (*image.shape[:2], 3))
