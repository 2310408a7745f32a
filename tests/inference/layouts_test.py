"""Against the projects themselves: golden files of `make_weights_golden.py`."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch_case
import weights_case

from bn_repro import config as config_lib
from bn_repro import parallel
from bn_repro.inference import layouts
from bn_repro.models import factory, inception_table
from bn_repro.training import model_file

HERE = Path(__file__).resolve().parent
TINY = ('model.name=inception_tiny', 'model.width=0.1')
UNITS = ['conv1', 'conv2_reduce', 'conv2']
MODULES = [f'inception_{row.name}' for row in inception_table.rows('576')]


def create(source, *overrides, num_classes=1000):
  """The layout, the config, the network, and the shapes of its variables."""
  layout = layouts.LAYOUTS[source]
  config = config_lib.load('inception', (*layout.fields, *overrides))
  model = factory.create_model(
    config.model, config.bn, num_classes, axis_name=None
  )
  leaves = parallel.named_leaves(factory.variable_shapes(model, (224, 224, 3)))
  return layout, config, model, {path: x.shape for path, x in leaves.items()}


def draw_theirs(source):
  """The tiny network in a layout, and what `create` returns."""
  created = create(source, *TINY, num_classes=7)
  layout, _, _, shapes = created
  return weights_case.draw(layouts.their_shapes(layout, shapes)), created


def golden_arrays(source, dtype):
  """Weights in a layout, and the golden outputs of the network with them."""
  golden = np.load(HERE / f'weights_{source}.npz')
  arrays = weights_case.draw(json.loads(str(golden['shapes'])))
  return {name: x.astype(dtype) for name, x in arrays.items()}, golden


def relative_error(found, expected):
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize('source', layouts.LAYOUTS)
@pytest.mark.parametrize(
  'dtype, tolerance',
  [
    ('float64', 1e-12),
    pytest.param('float32', 2e-6, marks=pytest.mark.slow),
  ],
)
def test_network_of_the_project(source, dtype, tolerance):
  """Names, shapes and logits; for TF-Slim the output of every end point."""
  with jax.enable_x64(dtype == 'float64'):
    arrays, golden = golden_arrays(source, dtype)
    logits = golden['logits']
    if source == 'slim':
      arrays, logits = layouts.without_background(arrays), logits[:, 1:]
    layout, config, model, shapes = create(source, f'model.dtype={dtype}')
    expected = layouts.their_shapes(layout, shapes)
    assert expected == {name: x.shape for name, x in arrays.items()}
    variables = layouts.to_ours(layout, arrays, shapes, config.bn.epsilon)
    assert {path: x.shape for path, x in variables.items()} == shapes
    assert {x.dtype for x in variables.values()} == {np.dtype(dtype)}
    found, state = model.apply(
      model_file.nested(variables),
      weights_case.images().astype(dtype),
      train=False,
      capture_intermediates=True,
      mutable=['intermediates'],
    )
  assert relative_error(np.asarray(found.main), logits) < tolerance
  maps = [
    np.asarray(state['intermediates'][name]['__call__'][0])
    for name in UNITS + MODULES
  ]
  if source == 'slim':
    assert len(golden['maps']) == len(maps) == 13
    norms, products = torch_case.projections(maps).T
    golden_norms, golden_products = golden['maps'].T
    np.testing.assert_allclose(norms, golden_norms, rtol=tolerance)
    error = np.abs(products - golden_products) / golden_norms
    assert error.max() < tolerance


def test_background_of_slim_is_dropped_and_other_classifiers_are_kept():
  arrays, _ = golden_arrays('slim', 'float32')
  name = 'InceptionV2/Logits/Conv2d_1c_1x1/'
  dropped = layouts.without_background(arrays)
  np.testing.assert_array_equal(
    dropped[name + 'weights'], arrays[name + 'weights'][:, :, :, 1:]
  )
  np.testing.assert_array_equal(
    dropped[name + 'biases'], arrays[name + 'biases'][1:]
  )
  again = layouts.without_background(dropped)
  assert layouts.num_classes(layouts.LAYOUTS['slim'], again) == 1000
  others = set(arrays) - {name + 'weights', name + 'biases'}
  assert all(dropped[other] is arrays[other] for other in others)


def test_what_slim_lacks_is_an_identity():
  """Gamma, and BN in the first unit: exactly, in float32."""
  arrays, (layout, config, _, shapes) = draw_theirs('slim')
  arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
  variables = layouts.to_ours(layout, arrays, shapes, config.bn.epsilon)
  gammas = [x for path, x in variables.items() if path.endswith('/scale')]
  assert len(gammas) == 15 and all((x == 1).all() for x in gammas)
  assert (variables['batch_stats/conv1/bn/mean'] == 0).all()
  var = variables['batch_stats/conv1/bn/var']
  assert (var + np.float32(config.bn.epsilon) == 1).all()
  np.testing.assert_array_equal(
    variables['params/conv1/bn/bias'],
    arrays['InceptionV2/Conv2d_1a_7x7/biases'],
  )


@pytest.mark.parametrize('source', ['cadene', 'pytorchcv'])
def test_bias_is_folded_into_the_mean(source):
  """BN(x + bias) with the mean is BN(x) with the mean less the bias."""
  arrays, (layout, _, _, shapes) = draw_theirs(source)
  variables = layouts.to_ours(layout, arrays, shapes, 1e-5)
  mean = 'batch_stats/inception_3c/conv_double_2/bn/mean'
  conv, bn = {
    'cadene': (
      'inception_3c_double_3x3_2.bias',
      'inception_3c_double_3x3_2_bn.running_mean',
    ),
    'pytorchcv': (
      'features.stage2.unit1.branches.branch2.conv3.conv.bias',
      'features.stage2.unit1.branches.branch2.conv3.bn.running_mean',
    ),
  }[source]
  np.testing.assert_array_equal(variables[mean], arrays[bn] - arrays[conv])


def test_import_export_import_is_the_identity():
  """To the bit, in float32; the first import folds random biases."""
  arrays, (layout, _, _, shapes) = draw_theirs('cadene')
  arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
  first = layouts.to_ours(layout, arrays, shapes, 1e-5)
  exported = layouts.to_cadene(first)
  assert {name: x.shape for name, x in exported.items()} == (
    layouts.their_shapes(layout, shapes)
  )
  second = layouts.to_ours(layout, exported, shapes, 1e-5)
  assert first.keys() == second.keys()
  for path, array in first.items():
    assert array.dtype == second[path].dtype == np.float32
    assert array.tobytes() == second[path].tobytes(), path
  # What has no bias is exported as it was.
  kernel = 'inception_3a_3x3.weight'
  np.testing.assert_array_equal(exported[kernel], arrays[kernel])
