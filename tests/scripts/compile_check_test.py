"""Programs for TPU slices that are not there: what they cost, and mistakes."""

import importlib.util
import json
import os
from pathlib import Path
import shlex

import jax
import jax.numpy as jnp
import pytest
from tiny import rows

os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
import compile_check

from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.models import inception_table
from bn_repro.models.summary import layers
from bn_repro.tpu import cost, estimate, slices

PROGRAM = Path('tests/tpu/small_program.hlo').read_text()


def test_bytes_by_what_they_are_for():
  """Counted by hand: in tiles, and in main memory alone."""
  found = cost.bytes_by_kind(PROGRAM)
  image = 2 * 32 * 8 * 8 * 128  # 16 channels fill a tile of 128.
  kernel = 2 * 9 * 16 * 128
  assert found == {
    # The kernel is fetched into the chip; this is for the convolution.
    cost.CONVOLUTION: 2 * image + kernel,
    cost.BN: image,
    cost.OPTIMIZER: 4 * 128,
    cost.COLLECTIVES: 0,
    cost.POOLING: 0,
    cost.DISTORTION: 0,
    cost.OTHER: 0,
  }


def test_least_time_by_hand():
  step = cost.Cost(
    memory=0,
    code=0,
    flops=197e12,
    bytes_accessed=0,
    by_kind={cost.BN: 819e9 / 2},
    num_collectives=1,
    collective_bytes=200e9,
  )
  parts = cost.least_seconds(step, slices.CHIPS['v5e'], num_chips=4)
  assert parts == pytest.approx(
    {'computing': 1.0, 'memory': 0.5, 'links': 2 * 3 / 4}
  )
  assert cost.least_step_seconds(step, slices.CHIPS['v5e'], 4) == pytest.approx(
    2.5
  )


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
  """As Google's pages list them."""
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


def test_every_listed_slice_is_known_to_the_compiler():
  for chip in slices.CHIPS.values():
    for topology in chip.topologies:
      devices = estimate.slice_devices(slices.Slice(chip, topology))
      assert len(devices) == slices.Slice(chip, topology).num_chips


def of_config(variant, topology, *overrides, names=('train_steps',)):
  config = config_lib.load(f'configs/{variant}.py:mini', overrides)
  program = estimate.abstract_program(
    estimate.resolve(config, 'tpu'),
    estimate.slice_devices(slices.parse_slice(topology)),
  )
  return program, estimate.of_program(program, print, names)


@pytest.fixture
def small_network(monkeypatch):
  monkeypatch.setattr(inception_table, 'rows', rows)


VARIANTS = ('inception', 'bn_baseline', 'bn_x5', 'bn_x30', 'bn_x5_sigmoid')


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_small_network_of_every_variant_compiles(variant, small_network):
  """For a slice: two modules of the ten."""
  _, found = of_config(variant, 'v5e:2x2', 'batch_size=16')
  (step,) = found.steps.values()
  assert step.by_kind[cost.CONVOLUTION] and step.collective_bytes


@pytest.mark.parametrize(
  'variant',
  [
    variant
    if variant == 'bn_x5'
    else pytest.param(variant, marks=pytest.mark.slow)
    for variant in VARIANTS
  ],
)
def test_every_variant_compiles_for_a_slice(variant):
  program, found = of_config(variant, 'v5e:2x2', 'batch_size=128')
  assert (found.num_devices, found.dtype) == (4, 'bfloat16')
  assert found.memory < slices.CHIPS['v5e'].memory
  step = found.steps['train_steps']
  # Three times the forward pass, in multiply-adds, but for the first layer.
  table = layers(program.model, program.dataset.image_shape, depth=2)
  forward = sum(layer.multiply_adds for layer in table)
  assert 0.9 < step.flops / (3 * 2 * 32 * forward) < 1.6
  assert step.by_kind[cost.CONVOLUTION] and step.by_kind[cost.POOLING]
  # Sibling branches are merged: fewer than one for each of 69 layers.
  with_bn = variant != 'inception'
  assert (2 * 20 < step.num_collectives < 2 * 69) == with_bn
  params = sum(x.size for x in jax.tree.leaves(program.initial_state().params))
  assert step.collective_bytes > 4 * params


def test_chips_do_the_same_whatever_their_number(small_network):
  """At 8 images a chip: memory and messages of 4, 16 and 64 chips."""
  found = [
    of_config('bn_x5', topology, f'batch_size={8 * chips}')[1]
    for topology, chips in (('v5e:2x2', 4), ('v5e:4x4', 16), ('v5e:8x8', 64))
  ]
  memory = [each.memory - each.steps['train_steps'].code for each in found]
  assert max(memory) < 1.02 * min(memory)
  (messages,) = {each.steps['train_steps'].collective_bytes for each in found}
  assert messages > 0


def test_bytes_agree_with_the_compilers_own():
  """Which counts the chip's own memory as well."""
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


def test_before_compiling_activations_grow_with_the_batch(small_network):
  def held(batch_size):
    config = config_lib.load(
      'configs/bn_x5.py:mini', (f'batch_size={batch_size}',)
    )
    program = estimate.abstract_program(config, jax.devices()[:1])
    return estimate.without_compiling(program)

  one, two, three = (held(size).memory for size in (8, 16, 24))
  assert two - one == three - two > 0
  # More than the batch, its input and output of every convolution.
  assert two - one > 8 * 4 * 32 * 32


@pytest.mark.parametrize(
  'limit, start, expected',
  [(100, 8, 96), (64, 8, 64), (7, 32, 6), (1, 4, 1), (0, 4, 0), (40, 32, 32)],
)
def test_largest_batch(limit, start, expected):
  """To a half more, in few trials."""
  tried = []

  def fits(batch_size):
    tried.append(batch_size)
    return batch_size <= 4 * limit

  assert estimate.largest_batch(fits, 4, start) == 4 * expected
  assert len(tried) == len(set(tried)) < 8


@pytest.mark.parametrize(
  'arguments, expected',
  [
    (('--topology=v5e:3x3',), 'no such slice of v5e. There are v5e:1x1'),
    (('--topology=v9:2x2',), 'no such TPU'),
    ((), 'takes --topology'),
    (('--topology=v5e:4x4', '--num_devices=4'), 'takes --topology'),
    (('--topology=v5e:4x4', '--batch_size=40'), 'multiple of the 16 devices'),
    (
      ('--topology=v5e:4x4', '--batch_size=16', '--config.model.dtype=float64'),
      'a TPU has none',
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


def test_without_the_compiler(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  arguments = ['--config=configs/bn_x5.py:mini', '--topology=v5e:2x2']
  assert compile_check.main(arguments) == 1
  assert 'pip install -r requirements-tpu.txt' in capsys.readouterr().err


def test_what_does_not_fit(small_network, monkeypatch, capsys):
  """As the compiler says it of a program that is too large."""

  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError(
        'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used '
        '20.1G of 15.75G hbm. Exceeded hbm capacity by 4.35G.\nMore.'
      )

  monkeypatch.setattr(
    estimate.Experiment, 'lower', lambda self, state: {'train_steps': Lowered()}
  )
  arguments = ['--config=configs/bn_x5.py:mini', '--topology=v5e:2x2']
  assert compile_check.main(arguments) == 1
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
  """Stands in for one: a chip takes a GB for every so many images.

  Attributes:
    images_a_gb: of a training step.
    evaluation_gb: what the other steps take.
    interrupted_at: the batch at which the user has enough.
    seen: each batch, and which of its steps.
  """

  def __init__(self):
    self.images_a_gb = 1.0
    self.evaluation_gb = 0.0
    self.interrupted_at = 0
    self.seen = []

  def of_program(self, program, say, names=estimate.STEPS):
    size = program.config.batch_size
    self.seen.append((size, names))
    if size == self.interrupted_at:
      raise KeyboardInterrupt
    sizes = dict.fromkeys(names, self.evaluation_gb * 1e9)
    sizes['train_steps'] = size / 4 / self.images_a_gb * 1e9
    if sizes['train_steps'] > 16.9e9:
      raise estimate.DoesNotFit('Exceeded hbm capacity.')
    return estimate.Estimate(
      batch_size=size,
      num_devices=4,
      dtype='bfloat16',
      num_parameters=1,
      steps={name: step(memory) for name, memory in sizes.items()},
      calls=dict.fromkeys(names, 1),
    )


@pytest.fixture
def compiler(small_network, monkeypatch):
  found = Compiler()
  monkeypatch.setattr(estimate, 'of_program', found.of_program)
  return found


FIND = (
  '--config=configs/bn_x5.py:mini',
  '--topology=v5e:2x2',
  '--find_batch_size',
)


@pytest.mark.parametrize(
  'arguments, images_a_gb, expected',
  [
    (('--batch_size=36',), 8, (432, 108)),
    # Of 24, 16.5 GB: more than there are, and within the compiler's own limit.
    (('--batch_size=32',), 24 / 16.5, (64, 16)),
    # Half as much again is no multiple of the groups.
    (('--config.bn.statistics=group', '--batch_size=128'), 3, (128, 32)),
    (('--config.bn.statistics=group', '--batch_size=256'), 7, (384, 96)),
  ],
)
def test_a_batch_that_is_found_fits(
  arguments, images_a_gb, expected, compiler, capsys
):
  compiler.images_a_gb = images_a_gb
  assert compile_check.main([*FIND, *arguments]) == 0
  said = capsys.readouterr().out
  found, share = expected
  assert f'training step fits: {found}, {share} a chip' in said
  assert said.splitlines()[-1].startswith('fits: ')
  # The last is of all steps.
  assert compiler.seen[-1] == (found, estimate.STEPS)


def test_a_batch_is_found_by_its_training_step_alone(compiler, capsys):
  """And the verdict is of all."""
  compiler.evaluation_gb = 20
  assert compile_check.main([*FIND, '--batch_size=32']) == 1
  said = capsys.readouterr().out
  assert 'training step fits: 64, 16 a chip' in said
  assert said.splitlines()[-1].startswith('does not fit: ')


def test_a_search_that_is_interrupted(compiler, capsys):
  compiler.images_a_gb, compiler.interrupted_at = 100, 256
  with pytest.raises(KeyboardInterrupt):
    compile_check.main([*FIND, '--batch_size=32'])
  assert 'fits: 128, 32 a chip' in capsys.readouterr().out


def test_no_batch_fits(compiler, capsys):
  compiler.images_a_gb = 0.01
  assert compile_check.main([*FIND, '--batch_size=32']) == 1
  said = capsys.readouterr()
  assert said.out == ''
  assert 'error: no batch that was tried fits.' in said.err


def test_steps_in_a_call_cost_as_much_each():
  """XLA counts what is in a loop once."""

  def found(number):
    config = config_lib.load(
      'configs/bn_mnist.py:mini',
      (f'steps_per_call={number}', 'data.distorted_copies=0'),
    )
    program = estimate.abstract_program(
      estimate.resolve(config, 'cpu'), jax.devices()[:1]
    )
    return estimate.of_program(program, print, ('train_steps',))

  assert found(50) == found(1)
  assert found(50).calls['train_steps'] == 50_000


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_what_is_said_and_written(platform, tmp_path, capsys):
  """With what it takes to make it again."""
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
  # Of 4,500 digits.
  expected = '50,000 steps of 64: 3,200,000 images, 711.1 epochs'
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


def test_factors_of_the_least_time_are_said_once():
  least, most = cost.SLOWER
  assert f'Expect {least} to {most} times as long' in compile_check.ASSUMPTIONS


def test_data_need_not_be_there():
  config = config_lib.load('configs/bn_x5.py', ('data.data_dir=/no',))
  dataset = estimate.datasets.load_sizes(config)
  assert len(dataset.splits['train']) == 1_281_167
  assert (dataset.image_shape, dataset.num_classes) == ((224, 224, 3), 1000)
  with pytest.raises(UserError):
    estimate.datasets.check(config)
