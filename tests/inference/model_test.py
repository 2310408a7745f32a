"""A loaded network says what its run said."""

import dataclasses
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
from support import environment

import bn_repro
from bn_repro.data import crops, datasets, jpeg
from bn_repro.errors import UserError
from bn_repro.inference import model as model_lib
from bn_repro.runtime.workdir import read_metrics

pytestmark = pytest.mark.xdist_group('inference')


@pytest.fixture(scope='module')
def model(trained_workdir):
  return bn_repro.load(trained_workdir)


def test_reproduces_the_last_population_line(trained_workdir, model):
  """From the raw digits, and from the same digits as PNG files."""
  config = model.file.config
  data = config.data.copy_and_resolve_references()
  raw = datasets.load(data, config.seed).splits['test']
  line = read_metrics(trained_workdir / 'metrics.jsonl')[-1]
  assert (line['split'], line['statistics']) == ('test', 'population')
  assert {k: v for k, v in line.items() if k != 'timing'} == (
    model.file.facts['evaluation']
  )
  probabilities = model.predict(raw.images[:, 2:-2, 2:-2])
  correct = (probabilities.argmax(-1) == raw.labels).sum()
  assert correct == round(line['accuracy'] * 1000)
  losses = -np.log(probabilities[np.arange(1000), raw.labels])
  np.testing.assert_allclose(losses.mean(), line['loss'], rtol=1e-5)


def test_images_in_any_form_give_the_same(model, tmp_path):
  digits = datasets.load(model.file.config.data, 0).splits['test'].images
  digits = digits[:3, 2:-2, 2:-2]
  expected = model.predict(digits)
  assert expected.shape == (3, 10)
  np.testing.assert_allclose(expected.sum(-1), 1, rtol=1e-6)
  paths = []
  for number, digit in enumerate(digits):
    paths.append(tmp_path / f'{number}.png')
    Image.fromarray(digit[..., 0]).save(paths[-1])
  for images in (
    paths,
    map(str, paths),
    [digits[0], paths[1], np.broadcast_to(digits[2], (28, 28, 3))],
    [digit[..., 0] for digit in digits],
  ):
    np.testing.assert_allclose(model.predict(images), expected, rtol=1e-4)
  np.testing.assert_allclose(model.predict(paths[1]), expected[1:2], rtol=1e-4)
  assert model.predict([]).shape == (0, 10)


def test_a_batch_is_not_seen_in_the_result(model):
  """Neither padding nor the other images of a batch change a prediction."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (35, 28, 28, 1), np.uint8)
  together = model.predict(images)
  alone = np.concatenate([model.predict(image) for image in images[30:]])
  np.testing.assert_allclose(together[30:], alone, rtol=1e-4)


def test_preprocessing_of_a_network_of_whole_images(model):
  """The central box of the right shape, resized, gray, and padded."""
  wide = np.zeros((56, 100, 3), np.uint8)
  wide[:, 22:78] = (255, 0, 0)
  seen = model.preprocess(wide)
  assert seen.shape == (32, 32, 1)
  assert not seen[:2].any() and not seen[:, -2:].any()
  # ITU-R 601: red has a luminance of 0.299.
  np.testing.assert_allclose(seen[2:-2, 2:-2], 76, atol=1)


@pytest.mark.parametrize(
  'name, box',
  [('square', crops.central_box), ('proportional', crops.proportional_box)],
)
def test_preprocessing_of_a_network_of_crops(model, tmp_path, name, box):
  """What evaluation sees of the same file, and of its pixels."""
  config = model.file.config.copy_and_resolve_references()
  with config.unlocked():
    config.data.evaluation_box = name
  file = dataclasses.replace(
    model.file,
    config=config,
    unpadded_shape=None,
    image_shape=(32, 32, 3),
  )
  cropped = model_lib.Model(file)
  rng = np.random.default_rng(0)
  small = rng.integers(0, 256, (8, 12, 3), np.uint8)
  path = tmp_path / 'a.jpg'
  Image.fromarray(small).resize((300, 200)).save(path)
  expected = np.empty((32, 32, 3), np.uint8)
  jpeg.decode_view(path.read_bytes(), box, expected, as_shown=True)
  np.testing.assert_array_equal(cropped.preprocess(path), expected)
  # A file is decoded at half of its size.
  pixels = np.asarray(Image.open(path))
  errors = cropped.preprocess(pixels).astype(int) - expected
  assert abs(errors).mean() < 4


def test_probabilities_of_a_network_in_bfloat16(model):
  """The softmax is computed in float32."""
  config = model.file.config.copy_and_resolve_references()
  with config.unlocked():
    config.model.dtype = 'bfloat16'
  rounded = model_lib.Model(dataclasses.replace(model.file, config=config))
  digits = datasets.load(config.data, 0).splits['test'].images[:32, 2:-2, 2:-2]
  probabilities = rounded.predict(digits)
  np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-6)
  np.testing.assert_allclose(probabilities, model.predict(digits), atol=0.1)


@pytest.mark.parametrize(
  'array',
  [np.zeros((28, 28), np.float32), np.zeros((28, 28, 4), np.uint8)],
)
def test_arrays_of_another_kind_are_refused(model, array):
  with pytest.raises(ValueError, match='an image must be uint8'):
    model.predict([array])


def test_undecodable_images(model, tmp_path):
  """One raises in `predict`, and is named in `predictions`."""
  good, bad = tmp_path / 'good.png', tmp_path / 'bad.png'
  Image.fromarray(np.zeros((28, 28), np.uint8)).save(good)
  bad.write_bytes(b'no image')
  images = [good, bad, tmp_path / 'none.png', good]
  found = list(model.predictions(images))
  assert [bool(each.error) for each in found] == [False, True, True, False]
  assert found[1].probabilities is None
  np.testing.assert_array_equal(found[0].probabilities, found[3].probabilities)
  with pytest.raises(UserError, match='bad.png: cannot be decoded'):
    model.predict(images)


def test_other_variables_are_refused(model):
  config = model.file.config.copy_and_resolve_references()
  with config.unlocked():
    config.bn.enabled = False
  with pytest.raises(UserError) as error:
    model_lib.Model(dataclasses.replace(model.file, config=config))
  assert len(error.value.problems) > 10


def test_no_model(tmp_path):
  with pytest.raises(UserError, match='at its first evaluation'):
    bn_repro.load(tmp_path)
  with pytest.raises(UserError, match='No such file'):
    bn_repro.load(tmp_path / 'none')


def test_needs_neither_training_data_nor_folder(trained_workdir, tmp_path):
  """In another folder; nothing of Orbax, Grain, tfds or Matplotlib."""
  code = (
    'import sys, bn_repro; assert "jax" not in sys.modules; '
    'import numpy as np; '
    f'model = bn_repro.load({str(trained_workdir)!r}); '
    'print(model.predict(np.zeros((28, 28), np.uint8)).shape); '
    'assert not {"orbax", "grain", "tensorflow_datasets", "matplotlib"} '
    '& set(sys.modules)'
  )
  said = subprocess.run(
    [sys.executable, '-c', code],
    cwd=tmp_path,
    env=environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert said.stdout == '(1, 10)\n', said.stderr
