"""Encoded images to the square of pixels that a network takes.

A view of an image is a box in it. Of a JPEG only the box is decoded, at the
smallest of libjpeg's scales (1, 1/2, 1/4, 1/8) that leaves it no smaller than
the square, and resized. This is done by libjpeg-turbo, through its TurboJPEG 3
interface, and OpenCV; both let other threads run meanwhile. What is not a JPEG
in YCbCr, RGB or grey goes through Pillow. Of a file that is damaged the views
that end before the damage are sound.
"""

from collections.abc import Callable
import ctypes
import ctypes.util
import functools
from importlib import metadata
import io
import re
import threading
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from bn_repro.errors import UserError

# Numbers that `view_boxes` takes for one image: the mirror, two for where the
# box lies, and two for each of `_ATTEMPTS` at its shape.
_ATTEMPTS = 10
DRAWS = 3 + 2 * _ATTEMPTS

# Larger images are refused by their header. The largest of ImageNet has 61
# million pixels; our choice.
MAX_PIXELS = 100_000_000

# Images that shrink by more are averaged over areas, others interpolated
# bilinearly, which costs half as much and is then nearly as good. Our choice.
_AREA_ABOVE = 1.5

# OpenCV's own threads would only compete with those that call it.
cv2.setNumThreads(1)
# The limit above takes its place: these formats are opened by their header.
Image.MAX_IMAGE_PIXELS = None
_FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'TIFF', 'WEBP')
# What libjpeg-turbo says of a file that is sound all the same: a marker of
# another version, or up to 99 stray bytes (our choice; where it has lost its
# place in the data, the rest of them are stray).
_HARMLESS = re.compile(r'JFIF|Adobe|\b\d{1,2} extraneous bytes')


class UndecodableImage(Exception):
  """Why an image cannot be decoded, or may not."""


class Box(NamedTuple):
  """A part of an image, in pixels from the top left corner."""

  left: int
  top: int
  width: int
  height: int


def central_box(width: int, height: int) -> Box:
  """The view of evaluation: central square, 224/256 of the shorter side.

  The same as making the shorter side 256 and taking the central 224 pixels
  (GoogLeNet's single crop).
  """
  side = max(round(min(width, height) * 224 / 256), 1)
  return Box((width - side) // 2, (height - side) // 2, side, side)


def random_box(width: int, height: int, draws: np.ndarray) -> Box:
  """A view of training: 8-100 % of the area, aspect ratio 3/4 to 4/3.

  The area is uniform and the aspect ratio log-uniform, drawn again while the
  box does not fit (GoogLeNet's recipe); after ten times, the largest central
  box of an allowed ratio.

  Args:
    width: of the image.
    height: of the image.
    draws: `DRAWS` numbers in [0, 1).
  """
  places, shapes = draws[1:3], draws[3:].reshape(_ATTEMPTS, 2)
  limit = np.log(4 / 3)
  areas = (0.08 + 0.92 * shapes[:, 0]) * width * height
  ratios = np.exp((2 * shapes[:, 1] - 1) * limit)
  widths = np.rint(np.sqrt(areas * ratios)).astype(int)
  heights = np.rint(np.sqrt(areas / ratios)).astype(int)
  fits = (
    (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
  )
  if not fits.any():
    box_width = max(min(width, round(height * 4 / 3)), 1)
    box_height = max(min(height, round(width * 4 / 3)), 1)
    return Box(
      (width - box_width) // 2,
      (height - box_height) // 2,
      box_width,
      box_height,
    )
  first = int(np.argmax(fits))
  box_width, box_height = int(widths[first]), int(heights[first])
  return Box(
    int(places[0] * (width - box_width + 1)),
    int(places[1] * (height - box_height + 1)),
    box_width,
    box_height,
  )


def is_mirrored(draws: np.ndarray) -> bool:
  """Whether a view of training is mirrored: every other one."""
  return bool(draws[0] < 0.5)


def decode_view(
  encoded: bytes, choose_box: Callable[[int, int], Box], out: np.ndarray
) -> None:
  """Decodes a view of an image.

  Args:
    encoded: a JPEG, or anything that Pillow reads.
    choose_box: `(width, height) -> Box`, in the whole image.
    out: uint8 (size, size, 3), filled with the view in RGB.

  Raises:
    UndecodableImage: with the reason. `out` may hold anything then.
  """
  if encoded[:2] == b'\xff\xd8':
    pixels = decode_jpeg(encoded, choose_box, len(out))
    if pixels is not None:
      shrinks = min(pixels.shape[:2]) > _AREA_ABOVE * len(out)
      how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
      cv2.resize(pixels, out.shape[:2], out, interpolation=how)
      return
  out[:] = _decode_by_pillow(encoded, choose_box, len(out))


def _check_size(width: int, height: int) -> None:
  if width * height > MAX_PIXELS:
    raise UndecodableImage(
      f'{width} x {height} pixels, more than {MAX_PIXELS:,}'
    )


def _decode_by_pillow(
  encoded: bytes, choose_box: Callable[[int, int], Box], size: int
) -> np.ndarray:
  """The same for other formats and colour spaces; slower."""
  try:
    image: Image.Image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
    _check_size(*image.size)
    box = choose_box(*image.size)
    if image.mode.startswith('I'):
      # Pillow would cut 16 bits off at 255.
      levels = np.asarray(image, np.uint32) >> 8
      image = Image.fromarray(levels.astype(np.uint8))
    resized = image.convert('RGB').resize(
      (size, size),
      Image.Resampling.BILINEAR,
      (box.left, box.top, box.left + box.width, box.top + box.height),
    )
  except UndecodableImage:
    raise
  except UnidentifiedImageError as error:
    raise UndecodableImage(f'{len(encoded)} bytes, not an image') from error
  # Pillow's readers raise all sorts of errors on a damaged file.
  except Exception as error:
    raise UndecodableImage(f'{type(error).__name__}: {error}') from error
  return np.asarray(resized)


# The TurboJPEG 3 interface, from turbojpeg.h of libjpeg-turbo 3.
_INIT_DECOMPRESS = 1
_SUBSAMPLING, _WIDTH, _HEIGHT, _PRECISION, _COLORSPACE = 4, 5, 6, 7, 8
_SCAN_LIMIT = 13
_RGB_PIXELS = 0
_RGB, _YCBCR, _GRAY = 0, 1, 2
# Width of the blocks at which a partial decode may begin, by subsampling.
_BLOCK_WIDTHS = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32, 6: 8}
_SCALES = (8, 4, 2, 1)
# More scans than an honest progressive file has; our choice.
_MAX_SCANS = 500


class _Region(ctypes.Structure):
  _fields_ = [(name, ctypes.c_int) for name in ('x', 'y', 'width', 'height')]


class _Scale(ctypes.Structure):
  _fields_ = [('num', ctypes.c_int), ('denom', ctypes.c_int)]


class _Decompressor:
  """One TurboJPEG handle, of one thread."""

  def __init__(self) -> None:
    self._library = library()
    self._handle = self._library.tj3Init(_INIT_DECOMPRESS)
    self._library.tj3Set(self._handle, _SCAN_LIMIT, _MAX_SCANS)

  def close(self) -> None:
    """Frees the handle."""
    self._library.tj3Destroy(self._handle)

  def decode(
    self, encoded: bytes, choose_box: Callable[[int, int], Box], size: int
  ) -> np.ndarray | None:
    """The pixels of a box in RGB; None if another decoder is to try.

    The pixels are at the smallest scale at which no side is below `size`, or at
    the full one.

    Raises:
      UndecodableImage: if the file is damaged. (Pillow would show it, grey or
        shifted from the damage on, and say nothing.)
    """
    library, handle = self._library, self._handle
    if library.tj3DecompressHeader(handle, encoded, len(encoded)):
      return None
    width, height = self._get(_WIDTH), self._get(_HEIGHT)
    _check_size(width, height)
    block_width = _BLOCK_WIDTHS.get(self._get(_SUBSAMPLING))
    if (
      block_width is None
      or self._get(_PRECISION) != 8
      or self._get(_COLORSPACE) not in (_RGB, _YCBCR, _GRAY)
    ):
      return None
    box = choose_box(width, height)
    scale = next(s for s in _SCALES if s == 1 or min(box[2:]) >= s * size)
    # Half a pixel of the view off at most, where the scale is not 1.
    left, top = round(box.left / scale), round(box.top / scale)
    right = round((box.left + box.width) / scale)
    bottom = round((box.top + box.height) / scale)
    begin = left - left % max(block_width // scale, 1)
    pixels = np.empty((bottom - top, right - begin, 3), np.uint8)
    library.tj3SetScalingFactor(handle, _Scale(1, scale))
    region = _Region(begin, top, right - begin, bottom - top)
    if library.tj3SetCroppingRegion(handle, region) or library.tj3Decompress8(
      handle, encoded, len(encoded), pixels.ctypes.data, 0, _RGB_PIXELS
    ):
      complaint = library.tj3GetErrorStr(handle).decode()
      if _HARMLESS.search(complaint):
        return None
      raise UndecodableImage(complaint)
    return pixels[:, left - begin :]

  def _get(self, parameter: int) -> int:
    return self._library.tj3Get(self._handle, parameter)


_of_thread = threading.local()


def decode_jpeg(
  encoded: bytes, choose_box: Callable[[int, int], Box], size: int
) -> np.ndarray | None:
  """The pixels of a box of a JPEG, as they are before the last resizing.

  Returns:
    uint8 (height, width, 3), no side below `size` unless the box's is; None
    where Pillow is to try.
  """
  decompressor = getattr(_of_thread, 'decompressor', None) or _Decompressor()
  _of_thread.decompressor = None
  pixels = None
  try:
    pixels = decompressor.decode(encoded, choose_box, size)
  finally:
    if pixels is None:
      # What is left of a bad image would show in the next one.
      decompressor.close()
  _of_thread.decompressor = decompressor if pixels is not None else None
  return pixels


@functools.cache
def library() -> Any:
  """libjpeg-turbo 3, as the package `turbojpeg` brings it, or the system's.

  Raises:
    UserError: if there is none.
  """
  try:
    files = metadata.files('turbojpeg') or []
  except metadata.PackageNotFoundError:
    files = []
  paths = [str(f.locate()) for f in files if 'libturbojpeg' in f.name]
  of_system = ctypes.util.find_library('turbojpeg')
  for path in [*paths, *([of_system] if of_system else [])]:
    library = ctypes.CDLL(path)
    if hasattr(library, 'tj3SetCroppingRegion'):
      return _declare(library)
  raise UserError(
    'no libjpeg-turbo 3, which decodes images. Run: pip install -r '
    'requirements.txt, or where it has no turbojpeg for this machine install '
    'libturbojpeg 3 with the system.'
  )


def _declare(library: Any) -> Any:
  """Gives the functions that are used their types."""
  handle, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
  text = ctypes.c_char_p
  for name, result, arguments in (
    ('tj3Init', handle, [number]),
    ('tj3Set', number, [handle, number, number]),
    ('tj3Destroy', None, [handle]),
    ('tj3Get', number, [handle, number]),
    ('tj3GetErrorStr', text, [handle]),
    ('tj3DecompressHeader', number, [handle, text, size]),
    ('tj3SetScalingFactor', number, [handle, _Scale]),
    ('tj3SetCroppingRegion', number, [handle, _Region]),
    (
      'tj3Decompress8',
      number,
      [handle, text, size, ctypes.c_void_p, number, number],
    ),
  ):
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
  return library
