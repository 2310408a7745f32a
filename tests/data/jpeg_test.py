"""Views of images against Pillow, and images that are not as they should be."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
import pytest
from sklearn.datasets import load_sample_images

from bn_repro.data import jpeg
from bn_repro.data.jpeg import Box, UndecodableImage

PHOTO = Image.fromarray(load_sample_images().images[0])


def encode(image, kind='JPEG', **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def view(encoded, size, box):
  out = np.zeros((size, size, 3), np.uint8)
  jpeg.decode_view(encoded, lambda width, height: box, out)
  return out


def by_pillow(encoded, size, box, resample=Image.Resampling.BICUBIC):
  corners = (box.left, box.top, box.left + box.width, box.top + box.height)
  image = Image.open(io.BytesIO(encoded)).convert('RGB')
  return np.asarray(image.resize((size, size), resample, corners))


def psnr(a, b):
  error = np.mean((a.astype(float) - b) ** 2)
  return 10 * np.log10(255**2 / error)


def draws(seed, count):
  return np.random.default_rng(seed).random((count, jpeg.DRAWS))


@pytest.mark.parametrize('subsampling', ['4:4:4', '4:2:2', '4:2:0'])
@pytest.mark.parametrize('progressive', [False, True])
@pytest.mark.parametrize(
  'size, least', [(224, 30), (100, 26), (50, 24), (16, 24)]
)
def test_a_box_is_what_pillow_makes_of_it(
  size, least, subsampling, progressive
):
  encoded = encode(
    PHOTO, quality=90, subsampling=subsampling, progressive=progressive
  )
  for numbers in draws(0, 20):
    box = jpeg.random_box(*PHOTO.size, numbers)
    found = view(encoded, size, box)
    assert psnr(found, by_pillow(encoded, size, box)) > least


def test_a_box_of_the_size_is_decoded_exactly():
  """Nothing is resized: the pixels of the whole decode, but for its borders.

  Chroma that is interpolated has no neighbours beyond the box.
  """
  encoded = encode(PHOTO, quality=90)
  for left, top in ((0, 0), (33, 7), (416, 203), (100, 100)):
    box = Box(left, top, 224, 224)
    found = view(encoded, 224, box)[2:-2, 2:-2].astype(int)
    expected = by_pillow(encoded, 224, box)[2:-2, 2:-2]
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize('factor', [2, 4, 8])
def test_smaller_scales_show_the_same_place(factor):
  """Shifted by a pixel of the view, the picture would fit worse."""
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


def test_grey_jpeg():
  grey = PHOTO.convert('L')
  box = Box(10, 20, 300, 300)
  found = view(encode(grey, quality=95), 128, box)
  np.testing.assert_array_equal(found[..., 0], found[..., 1])
  np.testing.assert_array_equal(found[..., 0], found[..., 2])
  assert psnr(found, by_pillow(encode(grey, quality=95), 128, box)) > 28


@pytest.mark.parametrize(
  'encoded',
  [
    pytest.param(encode(PHOTO.convert('CMYK'), quality=95), id='CMYK'),
    pytest.param(encode(PHOTO, 'PNG'), id='PNG'),
    pytest.param(encode(PHOTO.convert('RGBA'), 'PNG'), id='RGBA'),
    pytest.param(encode(PHOTO, 'BMP'), id='BMP'),
    pytest.param(encode(PHOTO, 'WEBP', quality=95), id='WebP'),
  ],
)
def test_other_images_under_the_name_of_a_jpeg(encoded):
  box = Box(10, 20, 300, 300)
  expected = by_pillow(encode(PHOTO, 'PNG'), 128, box)
  assert psnr(view(encoded, 128, box), expected) > 25


def test_sixteen_bits():
  levels = (np.asarray(PHOTO.convert('L')).astype(np.uint16) << 8) + 77
  encoded = encode(Image.fromarray(levels), 'PNG')
  box = Box(0, 0, 400, 400)
  expected = by_pillow(encode(PHOTO.convert('L'), 'PNG'), 128, box)
  assert psnr(view(encoded, 128, box), expected) > 25


def test_palette():
  encoded = encode(PHOTO.quantize(64), 'GIF')
  box = Box(0, 0, 400, 400)
  expected = by_pillow(encode(PHOTO, 'PNG'), 128, box)
  assert psnr(view(encoded, 128, box), expected) > 20


WHOLE = encode(PHOTO, quality=90)


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
    view(encoded, 64, Box(0, 0, *PHOTO.size))
  # The next image is not affected.
  np.testing.assert_array_equal(view(WHOLE, 64, Box(9, 9, 200, 200)), before)


def test_damage_that_pillow_shows_and_keeps_silent_about():
  """Half of a file with an end put to it, a hole, and bytes that are gone."""
  middle = len(WHOLE) // 2
  for encoded in (
    WHOLE[:middle] + b'\xff\xd9',
    WHOLE[:middle] + b'\0' * 4000 + WHOLE[middle + 4000 :],
    WHOLE[:middle] + WHOLE[middle + 5000 :],
  ):
    whole = Box(0, 0, *PHOTO.size)
    assert psnr(by_pillow(encoded, 64, whole), by_pillow(WHOLE, 64, whole)) < 25
    with pytest.raises(UndecodableImage, match='.'):
      view(encoded, 64, whole)


def test_what_stands_before_the_cut_is_shown():
  box = Box(0, 0, 200, 100)
  np.testing.assert_array_equal(
    view(WHOLE[: len(WHOLE) // 2], 64, box), view(WHOLE, 64, box)
  )


def test_stray_bytes_do_no_harm():
  """The decoder warns of them; the picture is whole."""
  scan = WHOLE.index(b'\xff\xda')
  encoded = WHOLE[:scan] + b'\0' * 20 + WHOLE[scan:]
  box = Box(0, 0, 400, 400)
  assert psnr(view(encoded, 128, box), by_pillow(WHOLE, 128, box)) > 25


def test_flipped_bits_never_crash():
  """Whatever comes out: pixels, or a reason."""
  rng = np.random.default_rng(0)
  for _ in range(300):
    damaged = bytearray(WHOLE)
    for place in rng.integers(2, len(damaged), 5):
      damaged[place] ^= 1 << int(rng.integers(8))
    try:
      out = np.empty((64, 64, 3), np.uint8)
      jpeg.decode_view(bytes(damaged), jpeg.central_box, out)
    except UndecodableImage as error:
      assert str(error)


def png_of_size(width, height):
  """The header of a PNG, with next to nothing in it."""

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
  """A small JPEG whose header claims to be large."""
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


def test_formats_that_decode_on_opening_are_none():
  """An icon holds a PNG, which Pillow decodes before its size can be asked."""
  picture = png_of_size(60_000, 60_000)
  entry = struct.pack('<BBBBHHII', 0, 0, 0, 0, 1, 32, len(picture), 22)
  icon = struct.pack('<HHH', 0, 1, 1) + entry + picture
  assert Image.open(io.BytesIO(encode(PHOTO.resize((8, 8)), 'ICO')))
  with pytest.raises(UndecodableImage, match='not an image'):
    view(icon, 64, Box(0, 0, 64, 64))


def test_large_images_are_decoded():
  encoded = encode(PHOTO.resize((7000, 5000)), quality=80)
  box = jpeg.central_box(7000, 5000)
  found = view(encoded, 224, box)
  expected = by_pillow(encode(PHOTO.resize((7000, 5000)), quality=80), 224, box)
  assert psnr(found, expected) > 25


def test_central_box_is_224_of_256():
  """As one crops after making the shorter side 256."""
  for width, height in ((500, 375), (375, 500), (256, 256), (1000, 300)):
    box = jpeg.central_box(width, height)
    scale = 256 / min(width, height)
    assert box.width == box.height
    assert box.width * scale == pytest.approx(224, abs=scale)
    assert box.left * scale == pytest.approx(
      (width * scale - 224) / 2, abs=scale
    )
    assert box.top * scale == pytest.approx(
      (height * scale - 224) / 2, abs=scale
    )


def test_random_boxes_have_the_areas_and_ratios_of_the_recipe():
  boxes = [jpeg.random_box(1000, 800, numbers) for numbers in draws(1, 4000)]
  left, top, width, height = np.array(boxes).T
  assert (left >= 0).all() and (left + width <= 1000).all()
  assert (top >= 0).all() and (top + height <= 800).all()
  area, ratio = width * height / 800_000, width / height
  assert 0.079 < area.min() < 0.085
  assert 0.9 < area.max() <= 1.0
  assert 0.745 < ratio.min() < 0.755 and 1.325 < ratio.max() < 1.34
  # Where every shape fits, areas are uniform and ratios log-uniform.
  small = area < 0.5
  assert area[small].mean() == pytest.approx((0.08 + 0.5) / 2, abs=0.01)
  assert np.log(ratio[small]).mean() == pytest.approx(0, abs=0.01)
  assert np.log(ratio[small]).std() == pytest.approx(
    2 * np.log(4 / 3) / np.sqrt(12), rel=0.03
  )
  # Anywhere it fits, with equal chances.
  share = left[width < 900] / (1000 - width[width < 900])
  assert share.mean() == pytest.approx(0.5, abs=0.02)
  assert np.quantile(share, [0.1, 0.9]) == pytest.approx([0.1, 0.9], abs=0.03)


def test_where_no_shape_fits_the_box_is_central():
  for width, height in ((1000, 20), (20, 1000), (1, 1), (1, 500)):
    for numbers in draws(2, 20):
      box = jpeg.random_box(width, height, numbers)
      assert 1 <= box.width <= width and 1 <= box.height <= height
      assert 0 <= box.left <= width - box.width
      assert 0 <= box.top <= height - box.height
  box = jpeg.random_box(1000, 20, np.full(jpeg.DRAWS, 0.99))
  assert box == Box(486, 0, 27, 20)


def test_every_other_view_is_mirrored():
  mirrored = [jpeg.is_mirrored(numbers) for numbers in draws(3, 2000)]
  assert np.mean(mirrored) == pytest.approx(0.5, abs=0.03)
