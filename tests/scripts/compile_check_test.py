"""Tests of the estimated cost of programs for TPU slices, without a TPU."""

import importlib.util
import json
import os
from pathlib import Path
import shlex

import jax
import jax.numpy as jnp
import pytest

os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
import compile_check

from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.models.summary import layers
from bn_repro.tpu import cost, estimate, slices

PROGRAM = Path('tests/tpu/small_program.hlo').read_text()


def test_bytes_by_kind():
  """Counted by hand, with the padding of tiles and without on-chip memory."""
  found = cost.bytes_by_kind(PROGRAM)
  image = 2 * 32 * 8 * 8 * 128  # 16 channels fill a tile of 128.
  kernel = 2 * 9 * 16 * 128
  assert found == {
    # The copy of the kernel into on-chip memory is for the convolution.
    cost.CONVOLUTION: 2 * image + kernel,
    cost.BN: image,
    cost.OPTIMIZER: 4 * 128,
    cost.COLLECTIVES: 0,
    cost.POOLING: 0,
    cost.DISTORTION: 0,
    cost.OTHER: 0,
  }


def test_lower_bounds():
  """Computed by hand."""
  step = cost.Cost(
    memory=0,
    code=0,
    flops=197e12,
    bytes_accessed=0,
    by_kind={cost.BN: 819e9 / 2},
    num_collectives=1,
    collective_bytes=200e9,
  )
  chip = slices.CHIPS['v5e']
  assert cost.lower_bounds(step, chip, num_chips=4) == pytest.approx(
    {'compute': 1.0, 'HBM': 0.5, 'interconnect': 2 * 3 / 4}
  )
  assert cost.min_step_seconds(step, chip, num_chips=4) == pytest.approx(2.5)


@pytest.mark.parametrize(
  'name, chips, hosts, accelerator',
  [
    ('v5e:1x1', 1, 1, 'v5litepod-1'),
    ('v5e:2x4', 8, 1, 'v5litepod-8'),
    ('v5e:4x4', 16, 4, 'v5litepod-16'),
    ('v6e:16x16', 256, 64, 'v6e-256'),
    ('v4:2x2x2', 8, 2, 'v4-16'),
    ('v5p:2x2x1', 4, 1, 'v5p-8'),
  ],
)
def test_slices(name, chips, hosts, accelerator):
  """As listed in Google's documentation."""
  found = slices.parse_slice(name)
  assert str(found) == name
  assert (found.num_chips, found.num_hosts) == (chips, hosts)
  assert found.accelerator_type == accelerator


@pytest.mark.parametrize(
  'name', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2']
)
def test_a_chip_is_one_device(name):
  devices = estimate.slice_devices(slices.parse_slice(name))
  assert len(devices) == slices.parse_slice(name).num_chips
  assert {device.platform for device in devices} == {'tpu'}


def test_the_compiler_knows_every_slice():
  for chip in slices.CHIPS.values():
    for topology in chip.topologies:
      devices = estimate.slice_devices(slices.Slice(chip, topology))
      assert len(devices) == slices.Slice(chip, topology).num_chips


def compile_config(variant, topology, *overrides, names=('train_steps',)):
  config = config_lib.load(f'configs/{variant}.py:mini', overrides)
  program = estimate.abstract_experiment(
    estimate.resolve(config, 'tpu'),
    estimate.slice_devices(slices.parse_slice(topology)),
  )
  return program, estimate.from_compiled(program, print, names)


TINY = 'model.name=inception_tiny'
# BN-x30 is the program of BN-x5: tests/training/steps_test.py.
VARIANTS = ('inception', 'bn_baseline', 'bn_x5', 'bn_x5_sigmoid')


@pytest.mark.parametrize(
  'variant, network',
  [
    ('bn_baseline', 'inception_tiny'),  # It has all that a variant can have.
    *(
      pytest.param(variant, network, marks=pytest.mark.slow)
      for variant, network in (
        ('inception', 'inception_tiny'),
        ('bn_x5', 'inception_tiny'),
        ('bn_x5_sigmoid', 'inception_tiny'),
        *((variant, 'inception') for variant in VARIANTS),
      )
    ),
  ],
)
def test_every_variant_compiles_for_a_slice(variant, network):
  program, found = compile_config(
    variant, 'v5e:2x2', 'batch_size=128', f'model.name={network}'
  )
  assert (found.num_devices, found.dtype) == (4, 'bfloat16')
  assert found.memory < slices.CHIPS['v5e'].memory
  step = found.steps['train_steps']
  # A step takes three times the multiply-adds of the forward pass, except in
  # the first layer.
  table = layers(program.model, program.dataset.image_shape, depth=2)
  forward = sum(layer.multiply_adds for layer in table)
  assert 0.9 < step.flops / (3 * 2 * 32 * forward) < 1.6
  assert step.by_kind[cost.CONVOLUTION] and step.by_kind[cost.POOLING]
  # Each layer with BN has a mean and a variance, and a reduction in each
  # direction. XLA combines those of parallel branches.
  state = program.initial_state()
  num_layers = len(jax.tree.leaves(state.batch_stats)) // 2
  with_bn = variant != 'inception'
  assert (num_layers / 2 < step.num_collectives < 2 * num_layers) == with_bn
  params = sum(x.size for x in jax.tree.leaves(state.params))
  assert step.collective_bytes > 4 * params


@pytest.mark.slow
def test_cost_per_chip_does_not_depend_on_their_number():
  """Memory and bytes of collectives, at 8 images per chip."""
  found = [
    compile_config('bn_x5', topology, f'batch_size={8 * chips}', TINY)[1]
    for topology, chips in (('v5e:2x2', 4), ('v5e:8x8', 64))
  ]
  memory = [each.memory - each.steps['train_steps'].code for each in found]
  assert max(memory) < 1.02 * min(memory)
  (sent,) = {each.steps['train_steps'].collective_bytes for each in found}
  assert sent > 0


def test_bytes_agree_with_those_of_xla():
  """XLA counts on-chip memory too, so the text is changed to hold none."""
  (device, *_) = estimate.slice_devices(slices.parse_slice('v5e:2x2'))
  place = jax.sharding.SingleDeviceSharding(device)

  def f(x, kernel):
    y = jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    return jax.nn.relu(y - y.mean((0, 1, 2), keepdims=True))

  lowered = jax.jit(f).lower(
    *(
      jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
      for shape in ((64, 56, 56, 128), (3, 3, 128, 128))
    )
  )
  with estimate.without_cache():
    compiled = lowered.compile()
  everywhere = compiled.as_text().replace('S(1)', '')
  assert sum(cost.bytes_by_kind(everywhere).values()) == pytest.approx(
    compiled.cost_analysis()['bytes accessed'], rel=0.1
  )


def test_memory_before_compilation_grows_with_the_batch():
  def held(batch_size):
    config = config_lib.load(
      'configs/bn_mnist.py:mini',
      (f'batch_size={batch_size}', 'data.distorted_copies=0'),
    )
    program = estimate.abstract_experiment(config, jax.devices()[:1])
    return estimate.from_lowered(program)

  one, two, three = (held(size).memory for size in (8, 16, 24))
  assert two - one == three - two > 0
  # More than the pixels of the images.
  assert two - one > 8 * 4 * 28 * 28


@pytest.mark.parametrize(
  'limit, start, expected',
  [(100, 8, 96), (64, 8, 64), (7, 32, 6), (1, 4, 1), (0, 4, 0), (40, 32, 32)],
)
def test_largest_batch(limit, start, expected):
  """Within a factor of 1.5, and with few compilations."""
  tried = []

  def fits(batch_size):
    tried.append(batch_size)
    return batch_size <= 4 * limit

  assert estimate.largest_batch(fits, 4, start) == 4 * expected
  assert len(tried) == len(set(tried)) < 8


@pytest.mark.parametrize(
  'arguments, expected',
  [
    (('--topology=v5e:3x3',), 'v5e has no such slice. Use one of v5e:1x1'),
    (('--topology=v9:2x2',), 'no such TPU'),
    ((), 'takes --topology'),
    (('--topology=v5e:4x4', '--num_devices=4'), 'takes --topology'),
    (('--topology=v5e:4x4', '--batch_size=40'), 'multiple of the 16 devices'),
    (
      ('--topology=v5e:4x4', '--batch_size=16', '--config.model.dtype=float64'),
      'a TPU has no float64',
    ),
    (('--platform=cpu', '--topology=v5e:4x4'), 'give --num_devices'),
    (('--platform=gpu', '--num_devices=0'), 'at least 1'),
    (('--platform=cpu', '--num_devices=5'), 'not a multiple of the 5 devices'),
    (('--topology=v5e:2x2', '--config.no=1'), 'no such field'),
    (('--topology=v5e:2x2', '--json=/no/x.json'), '--json=/no/x.json: cannot'),
    (('--topology=v5e:2x2', '--json=/tmp'), '--json=/tmp: cannot be written'),
    (
      (
        *('--topology=v5e:2x2', '--find_batch_size', '--batch_size=192'),
        '--config.bn.statistics=group',
      ),
      'must divide the 48 images of each of 4 devices',
    ),
  ],
)
def test_mistakes(arguments, expected, capsys):
  code = compile_check.main(['--config=configs/bn_x5.py:mini', *arguments])
  output = capsys.readouterr()
  assert (code, output.out) == (1, '')
  (line,) = output.err.splitlines()
  assert line.startswith('error: ') and expected in line


ON_SLICE = (
  '--config=configs/bn_x5.py:mini',
  f'--config.{TINY}',
  '--topology=v5e:2x2',
)


def test_without_the_compiler(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert compile_check.main(ON_SLICE) == 1
  assert 'pip install -r requirements-tpu.txt' in capsys.readouterr().err


def test_does_not_fit(monkeypatch, capsys):
  """With the compiler's error for a program that is too large."""

  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError(
        'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used '
        '20.1G of 15.75G hbm. Exceeded hbm capacity by 4.35G.\nMore.'
      )

  monkeypatch.setattr(
    estimate.Experiment, 'lower', lambda self, name, state: Lowered()
  )
  assert compile_check.main(ON_SLICE) == 1
  assert 'does not fit v5e:2x2: ' in capsys.readouterr().out


def step(memory):
  return cost.Cost(
    memory=memory,
    code=0,
    flops=1e9,
    bytes_accessed=1e9,
    by_kind=dict.fromkeys(cost.KINDS, 0),
    num_collectives=0,
    collective_bytes=0,
  )


class Compiler:
  """A stand-in whose programs take memory in proportion to the batch.

  Attributes:
    images_per_gb: images of a training step in a GB of a chip.
    evaluation_gb: memory of the other steps.
    interrupted_at: batch size at which the user interrupts the search.
    seen: batch size and steps of each compilation.
  """

  def __init__(self):
    self.images_per_gb = 1.0
    self.evaluation_gb = 0.0
    self.interrupted_at = 0
    self.seen = []

  def from_compiled(self, program, log, names=tuple(estimate.STEPS)):
    size = program.config.batch_size
    self.seen.append((size, names))
    if size == self.interrupted_at:
      raise KeyboardInterrupt
    sizes = dict.fromkeys(names, self.evaluation_gb * 1e9)
    sizes['train_steps'] = size / 4 / self.images_per_gb * 1e9
    if sizes['train_steps'] > 16.9e9:
      raise estimate.DoesNotFitError('Exceeded hbm capacity.')
    return estimate.Estimate(
      batch_size=size,
      num_devices=4,
      dtype='bfloat16',
      num_parameters=1,
      steps={name: step(memory) for name, memory in sizes.items()},
      calls=dict.fromkeys(names, 1),
    )


@pytest.fixture
def compiler(monkeypatch):
  found = Compiler()
  monkeypatch.setattr(estimate, 'from_compiled', found.from_compiled)
  return found


FIND = (*ON_SLICE, '--find_batch_size')


@pytest.mark.parametrize(
  'arguments, images_per_gb, expected',
  [
    (('--batch_size=36',), 8, (432, 108)),
    # A share of 24 takes 16.5 GB: more than a chip has, but within the
    # compiler's limit.
    (('--batch_size=32',), 24 / 16.5, (64, 16)),
    # 1.5 times the batch is not a multiple of the groups.
    (('--config.bn.statistics=group', '--batch_size=128'), 3, (128, 32)),
    (('--config.bn.statistics=group', '--batch_size=256'), 7, (384, 96)),
  ],
)
def test_a_batch_that_is_found_fits(
  arguments, images_per_gb, expected, compiler, capsys
):
  compiler.images_per_gb = images_per_gb
  assert compile_check.main([*FIND, *arguments]) == 0
  said = capsys.readouterr().out
  found, share = expected
  assert f'training step fits: {found}, {share} per chip' in said
  assert said.splitlines()[-1].startswith('fits: ')
  # The last compilation is of all steps.
  assert compiler.seen[-1] == (found, tuple(estimate.STEPS))


def test_the_search_compiles_the_training_step_alone(compiler, capsys):
  """The verdict is on all steps."""
  compiler.evaluation_gb = 20
  assert compile_check.main([*FIND, '--batch_size=32']) == 1
  said = capsys.readouterr().out
  assert 'training step fits: 64, 16 per chip' in said
  assert said.splitlines()[-1].startswith('does not fit: ')


def test_an_interrupted_search(compiler, capsys):
  compiler.images_per_gb, compiler.interrupted_at = 100, 256
  with pytest.raises(KeyboardInterrupt):
    compile_check.main([*FIND, '--batch_size=32'])
  assert 'fits: 128, 32 per chip' in capsys.readouterr().out


def test_no_batch_fits(compiler, capsys):
  compiler.images_per_gb = 0.01
  assert compile_check.main([*FIND, '--batch_size=32']) == 1
  said = capsys.readouterr()
  assert said.out == ''
  assert 'error: no batch that was tried fits.' in said.err


def test_cost_of_a_step_does_not_depend_on_steps_per_call():
  """XLA counts the body of a loop once."""

  def found(number):
    config = config_lib.load(
      'configs/bn_mnist.py:mini',
      (f'steps_per_call={number}', 'data.distorted_copies=0'),
    )
    program = estimate.abstract_experiment(
      estimate.resolve(config, 'cpu'), jax.devices()[:1]
    )
    return estimate.from_compiled(program, print, ('train_steps',))

  assert found(50) == found(1)
  assert found(50).calls['train_steps'] == 50_000


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_output(platform, tmp_path, capsys):
  """The file holds what is needed to reproduce the figures."""
  path = tmp_path / 'found.json'
  arguments = [
    '--config=configs/bn_mnist.py:mini',
    '--config.data.distorted_copies=0',
    f'--platform={platform}',
    '--num_devices=8',
    '--batch_size=64',
    f'--json={path}',
  ]
  assert compile_check.main(arguments) == 0
  # An epoch is 4,000 digits.
  expected = '50,000 steps of 64: 3,200,000 images, 800.0 epochs'
  assert f'\n{expected}\n' in capsys.readouterr().out
  facts = json.loads(path.read_text())
  assert facts['command'] == shlex.join(
    ['python', 'scripts/compile_check.py', *arguments]
  )
  assert facts['resolved_config']['batch_size'] == 64
  assert facts['resolved_config']['model']['dtype'] == (
    'float32' if platform == 'cpu' else 'bfloat16'
  )
  assert len(facts['git_revision'].removesuffix('-dirty')) == 40


def test_no_data_is_needed():
  config = config_lib.load('configs/bn_x5.py', ('data.data_dir=/no',))
  dataset = estimate.datasets.load_sizes(config)
  assert len(dataset.splits['train']) == 1_281_167
  assert (dataset.image_shape, dataset.num_classes) == ((224, 224, 3), 1000)
  with pytest.raises(UserError):
    estimate.datasets.check(config)
