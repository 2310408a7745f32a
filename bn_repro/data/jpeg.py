"""Decodes encoded images, whole or a box resized to a square of pixels.

Only the box of a JPEG is decoded, at the smallest of libjpeg's scales (1, 1/2,
1/4, 1/8) at which it is at least as large as the square. libjpeg-turbo decodes,
through its TurboJPEG 3 interface, and OpenCV resizes; both release the global
interpreter lock. Pillow decodes other formats and color spaces. A damaged JPEG
still yields the boxes that end above the damage.

ImageNet's images are decoded as TensorFlow decodes them, with their pixels as
stored. Other images are decoded as viewers show them: turned upright by their
EXIF data, and put on white where they are transparent.
"""

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
from PIL import ExifTags, Image, UnidentifiedImageError

from bn_repro.data import crops
from bn_repro.data.crops import Box, ChooseBox
from bn_repro.errors import UserError

# Images with more pixels are refused by their header. ImageNet's largest has 61
# million. Our choice.
MAX_PIXELS = 100_000_000

# A box that shrinks by a larger factor is resized to twice the size first. Our
# choice.
_TWO_STEPS_ABOVE = 1.5

# OpenCV's own threads would compete with the threads that call it.
cv2.setNumThreads(1)
# `MAX_PIXELS` replaces Pillow's limit. Pillow reads only the header to open a
# file of these formats.
Image.MAX_IMAGE_PIXELS = None
_FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'TIFF', 'WEBP')
# Warnings of libjpeg-turbo about sound files: an unknown version in a marker,
# or up to 99 stray bytes (our choice; in a damaged file all that follow the
# damage may be stray).
_HARMLESS = re.compile(r'JFIF|Adobe|\b\d{1,2} extraneous bytes')


class UndecodableImage(Exception):
  """An image that is damaged, too large or of an unknown format."""


def decode_view(
  encoded: bytes, choose_box: ChooseBox, out: np.ndarray, *, as_shown: bool
) -> None:
  """Decodes a box of an image into an array.

  Args:
    encoded: a JPEG, PNG, BMP, GIF, TIFF or WebP file.
    choose_box: function of the image's width and height that returns the box.
    out: uint8 (size, size, 3), overwritten with the resized box in RGB.
    as_shown: whether to turn the image upright and to put it on white.

  Raises:
    UndecodableImage: with the reason; the content of `out` is then undefined.
  """
  pixels = decode_jpeg(encoded, choose_box, len(out), as_shown=as_shown)
  if pixels is not None:
    resize(pixels, out)
    return
  image = _decode_by_pillow(encoded, as_shown=as_shown)
  box = choose_box(*image.size)
  size = (len(out), len(out))
  out[:] = np.asarray(
    image.resize(size, Image.Resampling.BILINEAR, box.corners)
  )


def decode_image(
  encoded: bytes, shorter_side: int, *, as_shown: bool
) -> np.ndarray:
  """Decodes a whole image.

  Args:
    encoded: a JPEG, PNG, BMP, GIF, TIFF or WebP file.
    shorter_side: least number of pixels of the shorter side that the caller
      needs: a larger JPEG is decoded at the smallest scale that has them. 0
      decodes every image at its full size.
    as_shown: whether to turn the image upright and to put it on white.

  Returns:
    uint8 (height, width, 3) in RGB.

  Raises:
    UndecodableImage: with the reason.
  """
  pixels = decode_jpeg(
    encoded, crops.whole_box, shorter_side or MAX_PIXELS, as_shown=as_shown
  )
  if pixels is None:
    pixels = np.asarray(_decode_by_pillow(encoded, as_shown=as_shown))
  return pixels


def resize(pixels: np.ndarray, out: np.ndarray) -> None:
  """Resizes bilinearly; if it shrinks a lot, to twice the size, then by half.

  The second step averages squares of two by two pixels. Averages over all areas
  would take more than twice the time, for 0.1 dB.

  Args:
    pixels: uint8 (height, width, 3).
    out: uint8 (new height, new width, 3), overwritten.
  """
  height, width = out.shape[:2]
  if min(pixels.shape[:2]) > _TWO_STEPS_ABOVE * min(height, width):
    pixels = cv2.resize(pixels, (2 * width, 2 * height))
    cv2.resize(pixels, (width, height), out, interpolation=cv2.INTER_AREA)
  else:
    cv2.resize(pixels, (width, height), out)


def _check_size(width: int, height: int) -> None:
  if width * height > MAX_PIXELS:
    raise UndecodableImage(
      f'{width} x {height} pixels, more than {MAX_PIXELS:,}'
    )


class _Turn(NamedTuple):
  """What makes stored pixels upright, in this order."""

  transpose: bool
  reverse_columns: bool
  reverse_rows: bool

  def pixels(self, stored: np.ndarray) -> np.ndarray:
    """Returns the upright image of stored pixels (height, width, 3)."""
    if self.transpose:
      stored = stored.swapaxes(0, 1)
    if self.reverse_columns:
      stored = stored[:, ::-1]
    if self.reverse_rows:
      stored = stored[::-1]
    return np.ascontiguousarray(stored)

  def box_to_store(self, choose_box: ChooseBox) -> ChooseBox:
    """Returns a function of the stored size that returns the stored box."""

    def choose(width: int, height: int) -> Box:
      if self.transpose:
        width, height = height, width
      box = choose_box(width, height)
      if self.reverse_columns:
        box = box._replace(left=width - box.left - box.width)
      if self.reverse_rows:
        box = box._replace(top=height - box.top - box.height)
      if self.transpose:
        box = Box(box.top, box.left, box.height, box.width)
      return box

    return choose


# By the orientation in EXIF data, from 1 for upright images.
_TURNS = {
  2: _Turn(transpose=False, reverse_columns=True, reverse_rows=False),
  3: _Turn(transpose=False, reverse_columns=True, reverse_rows=True),
  4: _Turn(transpose=False, reverse_columns=False, reverse_rows=True),
  5: _Turn(transpose=True, reverse_columns=False, reverse_rows=False),
  6: _Turn(transpose=True, reverse_columns=True, reverse_rows=False),
  7: _Turn(transpose=True, reverse_columns=True, reverse_rows=True),
  8: _Turn(transpose=True, reverse_columns=False, reverse_rows=True),
}


def _turn(image: Image.Image) -> _Turn | None:
  """Returns how to turn an image; None if it is upright."""
  try:
    return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
  except MemoryError:
    raise
  # Pillow raises errors of many types for damaged EXIF data, which viewers
  # ignore.
  except Exception:
    return None


def _decode_by_pillow(encoded: bytes, *, as_shown: bool) -> Image.Image:
  """Returns an image of any format and color space in RGB."""
  try:
    opened: Image.Image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
    _check_size(*opened.size)
    image = opened
    if as_shown and image.mode == 'F':
      raise UndecodableImage('its pixels are floating-point numbers')
    if image.mode.startswith('I'):
      # Pillow would clip 16-bit values to 255.
      levels = np.asarray(image, np.uint32) >> 8
      image = Image.fromarray(levels.astype(np.uint8))
    if as_shown and image.has_transparency_data:
      image = image.convert('RGBA')
      white = Image.new('RGBA', image.size, 'white')
      image = Image.alpha_composite(white, image)
    image = image.convert('RGB')
    turn = _turn(opened) if as_shown else None
    return Image.fromarray(turn.pixels(np.asarray(image))) if turn else image
  except (UndecodableImage, MemoryError):
    raise
  except UnidentifiedImageError as error:
    raise UndecodableImage(f'{len(encoded)} bytes, not an image') from error
  # Pillow raises errors of many types for damaged files.
  except Exception as error:
    raise UndecodableImage(f'{type(error).__name__}: {error}') from error


# The TurboJPEG 3 interface, from turbojpeg.h of libjpeg-turbo 3.
_INIT_DECOMPRESS = 1
_SUBSAMPLING, _WIDTH, _HEIGHT, _PRECISION, _COLORSPACE = 4, 5, 6, 7, 8
_SCAN_LIMIT = 13
_RGB_PIXELS = 0
_RGB, _YCBCR, _GRAY = 0, 1, 2
# A partial decode starts at a multiple of this width; by subsampling.
_BLOCK_WIDTHS = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32, 6: 8}
_SCALES = (8, 4, 2, 1)
# Limit on the scans of a progressive file; a sound one has far fewer. Our
# choice.
_MAX_SCANS = 500


class _Region(ctypes.Structure):
  _fields_ = [(name, ctypes.c_int) for name in ('x', 'y', 'width', 'height')]


class _Scale(ctypes.Structure):
  _fields_ = [('num', ctypes.c_int), ('denom', ctypes.c_int)]


class _Decompressor:
  """A TurboJPEG handle; not for use by several threads at once."""

  def __init__(self) -> None:
    self._library = load_turbojpeg()
    self._handle = self._library.tj3Init(_INIT_DECOMPRESS)
    self._library.tj3Set(self._handle, _SCAN_LIMIT, _MAX_SCANS)

  def close(self) -> None:
    """Frees the handle."""
    self._library.tj3Destroy(self._handle)

  def decode(
    self, encoded: bytes, choose_box: ChooseBox, size: int
  ) -> np.ndarray | None:
    """Does the work of `decode_jpeg`.

    Raises:
      UndecodableImage: if the file is damaged or too large. (Pillow decodes a
        damaged file silently, gray or shifted below the damage.)
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
    # Rounding moves an edge by half a pixel of the scaled image at most.
    left, top = round(box.left / scale), round(box.top / scale)
    right = round((box.left + box.width) / scale)
    bottom = round((box.top + box.height) / scale)
    begin = left - left % max(block_width // scale, 1)
    pixels = np.empty((bottom - top, right - begin, 3), np.uint8)
    region = _Region(begin, top, right - begin, bottom - top)
    if library.tj3SetScalingFactor(
      handle, _Scale(1, scale)
    ) or library.tj3SetCroppingRegion(handle, region):
      return None  # A sound kind of JPEG that it cannot crop, such as lossless.
    if library.tj3Decompress8(
      handle, encoded, len(encoded), pixels.ctypes.data, 0, _RGB_PIXELS
    ):
      message = library.tj3GetErrorStr(handle).decode()
      if _HARMLESS.search(message):
        return None
      raise UndecodableImage(message)
    return pixels[:, left - begin :]

  def _get(self, parameter: int) -> int:
    return self._library.tj3Get(self._handle, parameter)


_thread_local = threading.local()


def decode_jpeg(
  encoded: bytes, choose_box: ChooseBox, size: int, *, as_shown: bool
) -> np.ndarray | None:
  """Decodes a box of a JPEG, at the scale from which it is resized.

  Args:
    encoded: an image file.
    choose_box: function of the image's width and height that returns the box.
    size: side of the square that the box is resized to, in pixels.
    as_shown: whether to turn the image upright.

  Returns:
    uint8 (height, width, 3) in RGB, with no side below `size` unless the box
    itself is smaller; None if Pillow must decode this file.

  Raises:
    UndecodableImage: if the file is damaged or too large.
  """
  if not encoded.startswith(b'\xff\xd8'):
    return None
  turn = _turn_of_jpeg(encoded) if as_shown else None
  if turn:
    choose_box = turn.box_to_store(choose_box)
  decompressor = getattr(_thread_local, 'decompressor', None)
  decompressor = decompressor or _Decompressor()
  _thread_local.decompressor = None
  pixels = None
  try:
    pixels = decompressor.decode(encoded, choose_box, size)
  finally:
    if pixels is None:
      # A handle keeps state from a bad image, which would affect the next one.
      decompressor.close()
    else:
      _thread_local.decompressor = decompressor
  return turn.pixels(pixels) if turn and pixels is not None else pixels


def _turn_of_jpeg(encoded: bytes) -> _Turn | None:
  """Returns how to turn a JPEG; None if it is upright."""
  try:
    image = Image.open(io.BytesIO(encoded), formats=('JPEG',))
  except MemoryError:
    raise
  except Exception:  # The decoder finds out what is wrong.
    return None
  return _turn(image)


@functools.cache
def load_turbojpeg() -> Any:
  """Loads libjpeg-turbo 3 from the package `turbojpeg` or from the system.

  Raises:
    UserError: if neither has it.
  """
  try:
    files = metadata.files('turbojpeg') or []
  except metadata.PackageNotFoundError:
    files = []
  paths = [str(f.locate()) for f in files if 'libturbojpeg' in f.name]
  system_library = ctypes.util.find_library('turbojpeg')
  for path in [*paths, *([system_library] if system_library else [])]:
    library = ctypes.CDLL(path)
    if hasattr(library, 'tj3SetCroppingRegion'):
      return _declare(library)
  raise UserError(
    'libjpeg-turbo 3, which decodes images, is not installed. Run: pip install '
    '-r requirements.txt; if the package turbojpeg does not support this '
    "machine, install libturbojpeg 3 with the system's package manager."
  )


def _declare(library: Any) -> Any:
  """Declares the types of the functions in use."""
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
