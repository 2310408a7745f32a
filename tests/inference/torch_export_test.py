"""The exported network in PyTorch computes what ours computes."""

import json
from pathlib import Path
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bn_repro import config as config_lib
from bn_repro import parallel
from bn_repro.errors import UserError
from bn_repro.inference import torch_export, torch_network
from bn_repro.models import factory
from bn_repro.training import model_file

HERE = Path(__file__).resolve().parent
TINY = ('model.name=inception_tiny', 'model.width=0.1')
BN = ('bn.enabled=true', 'model.lrn=false')


def create(overrides, image_shape=(48, 64, 3), dtype='float64'):
  """A network with random variables, and its model file."""
  config = config_lib.load('inception', (*overrides, f'model.dtype={dtype}'))
  model = factory.create_model(config.model, config.bn, 7, axis_name=None)
  rng = np.random.Generator(np.random.Philox(3))

  def draw(path, leaf):
    if path[-1].key == 'var':
      return rng.uniform(0.5, 2, leaf.shape).astype(leaf.dtype)
    noise = rng.normal(size=leaf.shape)
    if leaf.ndim > 1:
      noise *= np.sqrt(2 / np.prod(leaf.shape[:-1]))
    return (noise + (path[-1].key == 'scale')).astype(leaf.dtype)

  variables = jax.tree_util.tree_map_with_path(
    draw, factory.variable_shapes(model, image_shape)
  )
  names = [f'class {label}' for label in range(7)]
  return model, model_file.ModelFile(
    variables, config, names, image_shape, None, {}
  )


def compare(model, file, tolerance):
  """Logits of both, on images of the shape of the file."""
  rng = np.random.Generator(np.random.Philox(5))
  dtype = parallel.named_leaves(file.variables)['params/classifier/bias'].dtype
  images = rng.uniform(-1, 1, (2, *file.image_shape)).astype(dtype)
  expected = np.asarray(model.apply(file.variables, images, train=False).main)
  weights = {
    name: torch.tensor(x) for name, x in torch_export.to_torch(file).items()
  }
  found = torch_network.logits(
    weights,
    torch.tensor(images.transpose(0, 3, 1, 2).copy()),
    **torch_export.settings(file.config),
  ).numpy()
  assert found.dtype == expected.dtype
  error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
  assert error < tolerance
  return weights


@pytest.mark.parametrize(
  'overrides, image_shape',
  [
    # Separable stem, padding of TensorFlow, 576.
    ((), (48, 64, 3)),
    # Padding is not symmetric, and other where the sizes are odd.
    ((), (53, 75, 3)),
    (('model.padding=torch', 'model.stem=plain'), (48, 64, 3)),
    (('model.padding=torch', 'model.stem=plain'), (53, 75, 3)),
    (('model.nonlinearity=sigmoid', 'bn.epsilon=0.1'), (48, 64, 3)),
    # The stem of the mode `mini`, on gray images.
    (
      ('model.stem=plain', 'model.stem_kernel=5', 'model.stem_pool=false'),
      (32, 32, 1),
    ),
  ],
)
def test_logits_of_small_networks(overrides, image_shape, x64):
  compare(*create((*BN, *TINY, *overrides), image_shape), 1e-9)


@pytest.mark.parametrize(
  'overrides, aux_head',
  [
    (('model.reading=608', 'model.padding=torch', 'model.stem=plain'), False),
    (('model.reading=576', 'model.aux_head=true'), True),
  ],
)
def test_logits_of_all_modules(overrides, aux_head, x64):
  """The whole table, an eighth as wide; training's head is left out."""
  width = 'model.width=0.125'
  model, file = create((*BN, width, *overrides), (64, 64, 3))
  assert ('aux_head' in file.variables['params']) == aux_head
  compare(model, file, 1e-9)


def test_logits_in_float32():
  compare(*create((*BN, *TINY), dtype='float32'), 1e-4)


def test_full_network_has_the_names_and_shapes_of_cadene():
  overrides = (*BN, 'model.reading=608', 'model.stem=plain')
  config = config_lib.load('inception', overrides)
  model = factory.create_model(config.model, config.bn, 1000, axis_name=None)
  variables = jax.tree.map(
    lambda x: np.broadcast_to(np.float32(0), x.shape),
    factory.variable_shapes(model, (224, 224, 3)),
  )
  file = model_file.ModelFile(variables, config, [], (224, 224, 3), None, {})
  golden = np.load(HERE / 'weights_cadene.npz')
  assert json.loads(str(golden['shapes'])) == {
    name: list(x.shape) for name, x in torch_export.to_torch(file).items()
  }


@pytest.mark.parametrize(
  'overrides, problems',
  [
    (('bn.enabled=false',), ['bn.enabled=False', 'model.lrn=True']),
    (('bn.enabled=true',), ['model.lrn=True']),
    ((*BN, 'bn.per_activation=true'), ['bn.per_activation=True']),
  ],
)
def test_networks_that_the_layout_cannot_hold(overrides, problems):
  config = config_lib.load('inception', (*TINY, *overrides))
  file = model_file.ModelFile({}, config, [], (48, 64, 3), None, {})
  with pytest.raises(UserError) as error:
    torch_export.to_torch(file)
  assert [
    problem.split(':')[0].removeprefix('config.')
    for problem in error.value.problems
  ] == problems


def test_mlp_is_refused():
  config = config_lib.load('bn_mnist:mini')
  file = model_file.ModelFile({}, config, [], (28, 28, 1), None, {})
  with pytest.raises(UserError, match='model.name=mlp'):
    torch_export.to_torch(file)


def test_card_runs_as_it_stands(tmp_path, monkeypatch, x64):
  """The code of the card, with its settings, from another folder."""
  import safetensors.numpy

  model, file = create((*BN, *TINY))
  safetensors.numpy.save_file(
    torch_export.to_torch(file), tmp_path / 'net.safetensors'
  )
  text = torch_export.card(file, 'net.safetensors')
  (code,) = re.findall('```python\n(.*?)```', text, re.DOTALL)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(Path(torch_network.__file__).parent)
  rng = np.random.Generator(np.random.Philox(5))
  pixels = rng.integers(0, 256, (2, *file.image_shape)).astype(np.float64)
  images = pixels / 127.5 - 1
  values = {'images': torch.tensor(images.transpose(0, 3, 1, 2).copy())}
  exec(code, values)
  expected = model.apply(file.variables, jnp.asarray(images), train=False).main
  np.testing.assert_allclose(values['logits'], expected, rtol=1e-9)
