"""Exported networks say the same, and run without this package."""

import dataclasses
import re
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
import safetensors.numpy
from support import environment
import torch

import bn_repro
from bn_repro import config as config_lib
from bn_repro import export as command
from bn_repro.errors import UserError
from bn_repro.inference import export, forward, torch_network
from bn_repro.models import factory
from bn_repro.training import model_file

pytestmark = pytest.mark.xdist_group('inference')


def images(count=3):
  return np.random.default_rng(1).integers(0, 256, (count, 32, 32, 1), np.uint8)


@pytest.fixture(scope='module')
def model(trained_workdir):
  return bn_repro.load(trained_workdir)


def run(capsys, *arguments):
  code = command.main(arguments)
  return code, *capsys.readouterr()


def test_stablehlo_runs_by_the_ten_lines_of_its_card(
  trained_workdir, model, tmp_path, capsys
):
  out = tmp_path / 'net.stablehlo'
  code, said, _ = run(
    capsys, f'--model={trained_workdir}', '--format=stablehlo', f'--out={out}'
  )
  assert code == 0
  assert str(out) in said
  card = (tmp_path / 'net.stablehlo.md').read_text()
  (program,) = re.findall(r'```\n(.*?)```', card, re.DOTALL)
  assert len(program.splitlines()) <= 10
  np.save(tmp_path / 'images.npy', images())
  program = re.sub(r'np\.zeros\(.*', "np.load('images.npy')", program)
  program += "np.save('out.npy', probabilities)\n"
  program += "assert 'bn_repro' not in sys.modules"
  done = subprocess.run(
    [sys.executable, '-c', f'import sys\n{program}'],
    cwd=tmp_path,
    env=environment(PYTHONPATH=''),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  np.testing.assert_allclose(
    np.load(tmp_path / 'out.npy'),
    forward.create_predict(model.file)(images()),
    rtol=0,
    atol=1e-5,
  )


def test_torch_has_the_names_and_logits_of_the_card(
  trained_workdir, model, tmp_path, capsys
):
  out = tmp_path / 'net.safetensors'
  code, *_ = run(
    capsys, f'--model={trained_workdir}', '--format=torch', f'--out={out}'
  )
  assert code == 0
  weights = {
    name: torch.from_numpy(array)
    for name, array in safetensors.numpy.load_file(out).items()
  }
  pixels = torch.from_numpy(images().transpose(0, 3, 1, 2)) / 127.5 - 1
  card = (tmp_path / 'net.safetensors.md').read_text()
  (call,) = re.findall(r'torch_network\.logits\(weights, images, (.*)\)', card)
  logits = torch_network.logits(weights, pixels, **eval(f'dict({call})'))
  np.testing.assert_allclose(
    torch.softmax(logits, -1).numpy(),
    forward.create_predict(model.file)(images()),
    atol=1e-5,
  )
  code, _, errors = run(
    capsys,
    f'--model={trained_workdir}',
    '--format=torch',
    '--fold',
    f'--out={tmp_path / "folded"}',
  )
  assert code == 1 and 'has batch normalization' in errors


@pytest.mark.parametrize('dtype', ['bfloat16', 'float64'])
def test_stablehlo_computes_in_float32(model, dtype, x64):
  config = model.file.config.copy_and_resolve_references()
  with config.unlocked():
    config.model.dtype = dtype
  variables = jax.tree.map(
    lambda x: np.asarray(x, np.float64 if dtype == 'float64' else x.dtype),
    dict(model.file.variables),
  )
  file = dataclasses.replace(model.file, config=config, variables=variables)
  program = jax.export.deserialize(bytearray(export.to_stablehlo(file)))
  text = program.mlir_module()
  assert 'f32' in text and 'f64' not in text and 'bf16' not in text


def test_safetensors_is_the_model_again(
  trained_workdir, model, tmp_path, capsys
):
  out = tmp_path / 'net.safetensors'
  code, *_ = run(
    capsys, f'--model={trained_workdir}', '--format=safetensors', f'--out={out}'
  )
  assert code == 0
  assert out.read_bytes() == (trained_workdir / model_file.NAME).read_bytes()
  card = (tmp_path / 'net.safetensors.md').read_text()
  line = model.file.facts['evaluation']
  count = line['num_examples']
  correct = round(line['accuracy'] * count)
  assert f'({correct:,} of {count:,} test images)' in card
  assert model.file.digest in card
  assert 'padded with black to 32x32' in card


def test_folding_by_hand(model):
  """In float64: y = gamma (Wu - mean) / sqrt(var + epsilon) + beta."""
  folded = export.fold(model.file)
  unit = model.file.variables['params']['conv1']
  statistics = model.file.variables['batch_stats']['conv1']['bn']
  rng = np.random.default_rng(0)
  patch = rng.normal(size=unit['conv']['kernel'].shape[:3])
  before = np.tensordot(patch, unit['conv']['kernel'].astype(float), 3)
  expected = (
    unit['bn']['scale']
    * (before - statistics['mean'])
    / np.sqrt(statistics['var'] + model.file.config.bn.epsilon)
  )
  expected = expected + unit['bn']['bias']
  layer = folded.variables['params']['conv1']['conv']
  found = np.tensordot(patch, layer['kernel'].astype(float), 3) + layer['bias']
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def randomized(spec, *overrides):
  """A network with random variables, also of BN."""
  config = config_lib.load(spec, overrides)
  network = factory.create_model(config.model, config.bn, 10)
  shape = (config.data.image_size, config.data.image_size, 1)
  rng = np.random.default_rng(0)
  variables = factory.initial_variables(network, shape, 0, 0.0, 1.0)

  def draw(tree):
    return {
      name: draw(x)
      if isinstance(x, dict)
      else x * rng.uniform(0.5, 2, x.shape).astype(x.dtype)
      + rng.uniform(0, 0.1, x.shape).astype(x.dtype)
      for name, x in tree.items()
    }

  return model_file.ModelFile(
    draw(variables),
    config,
    tuple('0123456789'),
    shape,
    None,
    {'statistics': 'population'},
  )


@pytest.mark.parametrize(
  'spec, overrides',
  [
    ('bn_x5:mini', ('model.name=inception_tiny', 'model.stem=separable')),
    ('bn_mnist:mini', ()),
  ],
)
def test_folded_networks_say_the_same(spec, overrides):
  file = randomized(spec, *overrides)
  assert export.folding_error(file) < 1e-4
  folded = export.fold(file)
  assert folded.variables['batch_stats'] == {}


def test_folding_is_refused(model):
  without = export.fold(model.file)
  with pytest.raises(UserError, match='no batch normalization'):
    export.fold(without)
  config = model.file.config.copy_and_resolve_references()
  with config.unlocked():
    config.bn.per_activation = True
  with pytest.raises(UserError, match='per activation'):
    export.fold(dataclasses.replace(model.file, config=config))


def test_folded_file_is_a_network_without_bn(
  trained_workdir, model, tmp_path, capsys
):
  out = tmp_path / 'folded'
  code, *_ = run(
    capsys,
    f'--model={trained_workdir}',
    '--format=safetensors',
    f'--out={out}',
    '--fold',
  )
  assert code == 0
  assert not [k for k in safetensors.numpy.load_file(out) if 'batch_stats' in k]
  np.testing.assert_allclose(
    forward.create_predict(model_file.read(out))(images()),
    forward.create_predict(model.file)(images()),
    atol=1e-5,
  )
  assert 'no logit changes by more than' in (tmp_path / 'folded.md').read_text()


def test_nothing_is_overwritten(trained_workdir, tmp_path, capsys):
  for existing in ('net', 'net.md'):
    (tmp_path / existing).write_text('precious')
    code, _, errors = run(
      capsys,
      f'--model={trained_workdir}',
      '--format=safetensors',
      f'--out={tmp_path / "net"}',
    )
    assert code == 1
    assert 'Name another file' in errors
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    (tmp_path / existing).unlink()
