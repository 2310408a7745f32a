"""Decoded boxes against Pillow, and damaged, disguised and oversized images."""

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image
import pytest
from sklearn.datasets import load_sample_images

from bn_repro.data import crops, jpeg
from bn_repro.data.crops import Box
from bn_repro.data.jpeg import UndecodableImage

PHOTO = Image.fromarray(load_sample_images().images[0])
ALL = Box(0, 0, *PHOTO.size)


def upright_image(encoded, shorter_side):
  return jpeg.decode_image(encoded, shorter_side, as_shown=True)


def encode(image, kind='JPEG', **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


WHOLE = encode(PHOTO, quality=90)


def view(encoded, size, box):
  out = np.zeros((size, size, 3), np.uint8)
  jpeg.decode_view(encoded, lambda width, height: box, out, as_shown=False)
  return out


def by_pillow(encoded, size, box):
  image = Image.open(io.BytesIO(encoded)).convert('RGB')
  return np.asarray(
    image.resize((size, size), Image.Resampling.BICUBIC, box.corners)
  )


def psnr(a, b):
  error = np.mean((a.astype(float) - b) ** 2)
  return 10 * np.log10(255**2 / error)


@pytest.mark.parametrize('subsampling', ['4:4:4', '4:2:2', '4:2:0'])
@pytest.mark.parametrize('progressive', [False, True])
def test_a_box_is_what_pillow_makes_of_it(subsampling, progressive):
  encoded = encode(
    PHOTO, quality=90, subsampling=subsampling, progressive=progressive
  )
  rng = np.random.default_rng(0)
  for size, least in ((224, 30), (100, 26), (50, 24), (16, 24)):
    for draws in rng.random((8, crops.NUM_DRAWS)):
      box = crops.random_box(*PHOTO.size, draws)
      found = view(encoded, size, box)
      assert psnr(found, by_pillow(encoded, size, box)) > least


def test_a_box_of_the_size_is_decoded_exactly():
  """Without resizing, the pixels are those of the whole image.

  The border differs: its interpolated chroma lacks the neighbors.
  """
  for left, top in ((0, 0), (33, 7), (416, 203), (100, 100)):
    box = Box(left, top, 224, 224)
    found = view(WHOLE, 224, box)[2:-2, 2:-2].astype(int)
    expected = by_pillow(WHOLE, 224, box)[2:-2, 2:-2]
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize('factor', [2, 4, 8])
def test_smaller_scales_show_the_same_place(factor):
  """A box moved by one pixel of the output fits worse."""
  encoded = encode(PHOTO.resize((1280, 854)), quality=90)
  size = 96
  box = Box(272, 136, size * factor, size * factor)
  if factor == 8:
    box = Box(272, 32, 800, 800)
  found = view(encoded, size, box)
  right = psnr(found, by_pillow(encoded, size, box))
  for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
    moved = box._replace(left=box.left + dx * factor, top=box.top + dy * factor)
    assert psnr(found, by_pillow(encoded, size, moved)) < right - 2


def test_gray_jpeg():
  encoded = encode(PHOTO.convert('L'), quality=95)
  box = Box(10, 20, 300, 300)
  found = view(encoded, 128, box)
  assert (found == found[..., :1]).all()
  assert psnr(found, by_pillow(encoded, 128, box)) > 28


GREY = PHOTO.convert('L')
SIXTEEN_BITS = Image.fromarray((np.asarray(GREY).astype(np.uint16) << 8) + 77)


@pytest.mark.parametrize(
  'encoded, original, least',
  [
    pytest.param(encode(image, kind, quality=95), original, least, id=name)
    for name, image, kind, original, least in (
      ('CMYK', PHOTO.convert('CMYK'), 'JPEG', PHOTO, 25),
      ('PNG', PHOTO, 'PNG', PHOTO, 25),
      ('RGBA', PHOTO.convert('RGBA'), 'PNG', PHOTO, 25),
      ('BMP', PHOTO, 'BMP', PHOTO, 25),
      ('WebP', PHOTO, 'WEBP', PHOTO, 25),
      ('16 bits', SIXTEEN_BITS, 'PNG', GREY, 25),
      ('palette', PHOTO.quantize(64), 'GIF', PHOTO, 20),
    )
  ],
)
def test_other_formats_and_color_spaces(encoded, original, least):
  box = Box(10, 20, 300, 300)
  expected = by_pillow(encode(original, 'PNG'), 128, box)
  assert psnr(view(encoded, 128, box), expected) > least


def oriented(image, orientation, kind='JPEG'):
  """A file whose EXIF data say how to turn its pixels."""
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = orientation
  return encode(image, kind, quality=95, exif=exif.tobytes())


# Number of quarter turns to the left that follow mirroring, by orientation:
# from the figures of the EXIF standard (CIPA DC-008, 4.6.5).
QUARTERS = {1: 0, 8: 1, 3: 2, 6: 3, 2: 0, 5: 1, 4: 2, 7: 3}


def upright(pixels, orientation):
  mirrored = pixels[:, ::-1] if orientation in (2, 4, 5, 7) else pixels
  return np.rot90(mirrored, QUARTERS[orientation])


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'TIFF', 'WEBP'])
def test_images_are_shown_upright(kind, orientation):
  encoded = oriented(PHOTO, orientation, kind)
  stored = upright_image(encode(PHOTO, kind, quality=95), 0)
  expected = upright(stored, orientation)
  np.testing.assert_array_equal(upright_image(encoded, 0), expected)
  # The box is one of the upright image.
  height, width = expected.shape[:2]
  sizes = []

  def choose_box(*size):
    sizes.append(size)
    return Box(24, 56, 160, 320)

  out = np.empty((80, 80, 3), np.uint8)
  jpeg.decode_view(encoded, choose_box, out, as_shown=True)
  assert sizes == [(width, height)]
  flat = encode(Image.fromarray(np.ascontiguousarray(expected)), 'PNG')
  found = by_pillow(flat, 80, Box(24, 56, 160, 320))
  moved = by_pillow(flat, 80, Box(26, 56, 160, 320))
  assert psnr(out, found) > max(24, psnr(out, moved) + 2)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_images_as_stored_are_not_turned(kind):
  np.testing.assert_array_equal(
    view(oriented(PHOTO, 6, kind), 64, ALL),
    view(oriented(PHOTO, 1, kind), 64, ALL),
  )


def test_damaged_exif_data_are_ignored():
  encoded = oriented(PHOTO, 6)
  start = encoded.index(b'Exif\0\0') + 6
  damaged = encoded[:start] + b'?' * 8 + encoded[start + 8 :]
  np.testing.assert_array_equal(
    upright_image(damaged, 0), upright_image(oriented(PHOTO, 1), 0)
  )


@pytest.mark.parametrize('mode, kind', [('RGBA', 'PNG'), ('LA', 'TIFF')])
def test_transparent_pixels_are_shown_on_white(mode, kind):
  pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
  if mode == 'LA':
    pixels = pixels[..., 2:]
  pixels[:5, ..., -1], pixels[5:10, ..., -1] = 0, 255
  encoded = encode(Image.fromarray(pixels, mode), kind)
  color, alpha = pixels[..., :-1].astype(float), pixels[..., -1:] / 255
  expected = np.broadcast_to(255 + alpha * (color - 255), (20, 30, 3))
  found = upright_image(encoded, 0)
  assert np.abs(found - expected).max() <= 1
  assert (found[:5] == 255).all() and (found[5:10] == expected[5:10]).all()
  # As stored, colors are what they are without transparency.
  out = np.empty((20, 20, 3), np.uint8)
  box = Box(0, 0, 20, 20)
  jpeg.decode_view(encoded, lambda *size: box, out, as_shown=False)
  assert (out == pixels[:, :20, :-1]).all()


def test_a_palette_with_a_transparent_color():
  indices = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
  image = Image.fromarray(indices, 'P')
  palette = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)
  image.putpalette(palette.tobytes())
  for kind in ('PNG', 'GIF'):
    found = upright_image(encode(image, kind, transparency=1), 0)
    expected = palette[indices]
    expected[indices == 1] = 255
    np.testing.assert_array_equal(found, expected)


def test_pixels_without_a_range_are_refused():
  """Nothing says what is white."""
  image = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
  with pytest.raises(UndecodableImage, match='floating-point'):
    upright_image(encode(image, 'TIFF'), 0)


def test_colors_of_other_kinds_of_images():
  """16 bits, CMYK, one bit, and planes of gray, against NumPy."""
  rng = np.random.default_rng(0)
  deep = rng.integers(0, 2**16, (9, 7), np.uint16)
  for kind in ('PNG', 'TIFF'):
    found = upright_image(encode(Image.fromarray(deep), kind), 0)
    np.testing.assert_array_equal(found, np.dstack([deep // 256] * 3))
  inks = rng.integers(0, 256, (9, 7, 4), np.uint8)
  found = upright_image(encode(Image.fromarray(inks, 'CMYK'), 'TIFF'), 0)
  light = 1 - inks / 255
  assert np.abs(found - 255 * light[..., :3] * light[..., 3:]).max() <= 1
  bits = rng.integers(0, 2, (9, 7)).astype(bool)
  found = upright_image(encode(Image.fromarray(bits), 'BMP'), 0)
  np.testing.assert_array_equal(found, np.dstack([255 * bits] * 3))
  gray = rng.integers(0, 256, (9, 7), np.uint8)
  found = upright_image(encode(Image.fromarray(gray), 'PNG'), 0)
  np.testing.assert_array_equal(found, np.dstack([gray] * 3))


@pytest.mark.parametrize(
  'shorter_side, height', [(0, 854), (428, 854), (427, 427), (214, 427)]
)
@pytest.mark.parametrize('orientation', [1, 6])
def test_whole_images_at_the_scale_that_is_needed(
  shorter_side, height, orientation
):
  """PNG files have no scales."""
  large = PHOTO.resize((1280, 854))
  shape = (height, round(height * 1280 / 854), 3)
  found = upright_image(oriented(large, orientation), shorter_side)
  if orientation == 6:
    found = np.rot90(found)
  assert found.shape == shape
  scaled = large.resize((shape[1], height), Image.Resampling.BOX)
  assert psnr(found, np.asarray(scaled)) > 30
  full = upright_image(encode(large, 'PNG'), shorter_side)
  np.testing.assert_array_equal(full, np.asarray(large))


def lossless(image):
  """Encodes an image as a lossless JPEG: ITU-T T.81, process 14.

  Each sample is predicted from its left neighbor, and the difference is written
  as its category, in four bits, and its value.
  """
  pixels = np.atleast_3d(np.asarray(image)).astype(int)
  height, width, channels = pixels.shape

  def segment(marker, content):
    return b'\xff' + marker + struct.pack('>H', len(content) + 2) + content

  frame = struct.pack('>BHHB', 8, height, width, channels)
  scan = bytes([channels])
  for channel in range(channels):
    frame += bytes([channel + 1, 0x11, 0])
    scan += bytes([channel + 1, 0])
  table = bytes([0, 0, 0, 0, 9, *[0] * 12, *range(9)])  # 9 codes of 4 bits.
  predicted = np.roll(pixels, 1, axis=1)
  predicted[1:, 0], predicted[0, 0] = pixels[:-1, 0], 128
  bits = ''
  for difference in (pixels - predicted).ravel().tolist():
    category = abs(difference).bit_length()
    bits += f'{category:04b}'
    if category:
      value = difference + (difference < 0) * (2**category - 1)
      bits += f'{value:0{category}b}'
  bits += '1' * (-len(bits) % 8)
  data = int(bits, 2).to_bytes(len(bits) // 8).replace(b'\xff', b'\xff\0')
  return (
    b'\xff\xd8'
    + segment(b'\xc3', frame)
    + segment(b'\xc4', table)
    + segment(b'\xda', scan + bytes([1, 0, 0]))
    + data
    + b'\xff\xd9'
  )


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('size', [8, 16, 32])
def test_lossless_jpeg(mode, size):
  """TurboJPEG cannot decode a part of one, at any scale. Pillow reads it."""
  image = PHOTO.resize((80, 64)).convert(mode)
  encoded = lossless(image)
  assert Image.open(io.BytesIO(encoded)).tobytes() == image.tobytes()
  box = Box(5, 7, 40, 40)
  expected = by_pillow(encode(image, 'PNG'), size, box)
  assert psnr(view(encoded, size, box), expected) > 25
  with pytest.raises(UndecodableImage, match='.'):
    view(encoded[: len(encoded) // 2], size, box)
  # The next image is not affected.
  assert view(WHOLE, 64, ALL).any()


def test_out_of_memory_is_not_damage(monkeypatch):
  def fail(*arguments):
    raise MemoryError

  monkeypatch.setattr(Image.Image, 'convert', fail)
  with pytest.raises(MemoryError):
    view(encode(PHOTO, 'PNG'), 64, ALL)


@pytest.mark.parametrize(
  'encoded',
  [
    pytest.param(b'', id='empty'),
    pytest.param(WHOLE[:2], id='two bytes'),
    pytest.param(WHOLE[:100], id='header alone'),
    pytest.param(WHOLE[: len(WHOLE) // 2], id='half'),
    pytest.param(encode(PHOTO, 'PNG')[:5000], id='a part of a PNG'),
    pytest.param(b'\xff\xd8' + b'\0' * 1000, id='zeros'),
    pytest.param(b'<html>404 not found</html>', id='a page'),
    pytest.param(np.random.default_rng(0).bytes(5000), id='noise'),
  ],
)
def test_damaged_images(encoded):
  before = view(WHOLE, 64, Box(9, 9, 200, 200))
  with pytest.raises(UndecodableImage, match='.'):
    view(encoded, 64, ALL)
  with pytest.raises(UndecodableImage, match='.'):
    upright_image(encoded, 64)
  # The next image is not affected.
  np.testing.assert_array_equal(view(WHOLE, 64, Box(9, 9, 200, 200)), before)


def test_damage_that_pillow_decodes_silently():
  """An end marker after half of a file, a hole, and missing bytes."""
  middle = len(WHOLE) // 2
  for encoded in (
    WHOLE[:middle] + b'\xff\xd9',
    WHOLE[:middle] + b'\0' * 4000 + WHOLE[middle + 4000 :],
    WHOLE[:middle] + WHOLE[middle + 5000 :],
  ):
    assert psnr(by_pillow(encoded, 64, ALL), by_pillow(WHOLE, 64, ALL)) < 25
    with pytest.raises(UndecodableImage, match='.'):
      view(encoded, 64, ALL)


def test_a_box_above_the_damage_is_decoded():
  box = Box(0, 0, 200, 100)
  np.testing.assert_array_equal(
    view(WHOLE[: len(WHOLE) // 2], 64, box), view(WHOLE, 64, box)
  )


def test_stray_bytes_do_no_harm():
  """The decoder warns of them, but the image is sound."""
  scan = WHOLE.index(b'\xff\xda')
  encoded = WHOLE[:scan] + b'\0' * 20 + WHOLE[scan:]
  box = Box(0, 0, 400, 400)
  assert psnr(view(encoded, 128, box), by_pillow(WHOLE, 128, box)) > 25


def test_flipped_bits_never_crash():
  """The result is pixels or a reason."""
  rng = np.random.default_rng(0)
  out = np.empty((64, 64, 3), np.uint8)
  for _ in range(300):
    damaged = bytearray(WHOLE)
    for place in rng.integers(2, len(damaged), 5):
      damaged[place] ^= 1 << int(rng.integers(8))
    try:
      jpeg.decode_view(bytes(damaged), crops.central_box, out, as_shown=False)
    except UndecodableImage as error:
      assert str(error)


def png_of_size(width, height):
  """A PNG with a header of this size and hardly any data."""

  def chunk(kind, content):
    crc = zlib.crc32(kind + content)
    return struct.pack('>I', len(content)) + kind + content + crc.to_bytes(4)

  header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(b'\0' * 1000))
    + chunk(b'IEND', b'')
  )


def jpeg_of_size(width, height):
  """A small JPEG whose header states this size."""
  raw = bytearray(encode(PHOTO.resize((64, 64))))
  frame = raw.index(b'\xff\xc0\x00\x11\x08')
  raw[frame + 5 : frame + 9] = struct.pack('>HH', height, width)
  return bytes(raw)


@pytest.mark.parametrize('make', [png_of_size, jpeg_of_size])
def test_bombs_are_refused_by_their_header(make, monkeypatch):
  def never(*arguments):
    raise AssertionError('decoded')

  monkeypatch.setattr(Image.Image, 'convert', never)
  with pytest.raises(UndecodableImage, match='60000 x 60000 pixels'):
    view(make(60_000, 60_000), 64, Box(0, 0, 64, 64))
  with pytest.raises(UndecodableImage, match='60000 x 60000 pixels'):
    upright_image(make(60_000, 60_000), 64)


def test_formats_that_decode_on_opening_are_refused():
  """Pillow decodes the PNG in an icon before its size is known."""
  picture = png_of_size(60_000, 60_000)
  entry = struct.pack('<BBBBHHII', 0, 0, 0, 0, 1, 32, len(picture), 22)
  icon = struct.pack('<HHH', 0, 1, 1) + entry + picture
  assert Image.open(io.BytesIO(encode(PHOTO.resize((8, 8)), 'ICO')))
  with pytest.raises(UndecodableImage, match='not an image'):
    view(icon, 64, Box(0, 0, 64, 64))


def test_large_images_are_decoded():
  encoded = encode(PHOTO.resize((7000, 5000)), quality=80)
  box = crops.central_box(7000, 5000)
  assert psnr(view(encoded, 224, box), by_pillow(encoded, 224, box)) > 25
