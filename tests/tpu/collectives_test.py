"""Compares the collectives of the steps with a reviewed list.

`python tests/tpu/collectives_test.py` updates the list.
"""

from pathlib import Path
import re
import sys

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests'), str(ROOT / 'scripts')]

from benchmarks import steps
import conftest  # noqa: F401 Eight devices, also without pytest.
import jax
import pytest

from bn_repro import config as config_lib
from bn_repro import parallel
from bn_repro.data import datasets
from bn_repro.tpu import collectives
from bn_repro.training.experiment import create_experiment

WRITTEN = Path(__file__).with_name('collectives.txt')
TINY = 'model.name=inception_tiny'
# Title, config and overrides of each listed step; 4 images per device.
STEPS = {
  'inception, mini': ('inception',),
  'bn_x5, mini': ('bn_x5',),
  'bn_baseline, inception_tiny': ('bn_baseline', TINY),
  'bn_x5, inception_tiny, statistics of each device': (
    'bn_x5',
    TINY,
    'bn.statistics=device',
  ),
  'bn_x5, inception_tiny, groups of 2 images, within a device': (
    'bn_x5',
    TINY,
    'bn.statistics=group',
    'bn.virtual_batch_size=2',
  ),
  'bn_x5, inception_tiny, groups of 8 images, across devices': (
    'bn_x5',
    TINY,
    'bn.statistics=group',
    'bn.virtual_batch_size=8',
  ),
}


def program(variant, num_devices, *overrides):
  config = config_lib.load(f'configs/{variant}.py:mini', overrides)
  mesh = parallel.create_mesh(jax.devices()[:num_devices])
  assert mesh.devices.size == num_devices
  return create_experiment(config, datasets.check(config), mesh)


def lower(program):
  return program.steps.train_steps.lower(
    program.initial_state(), program.abstract_batch(1)
  )


def found(variant, num_devices, *overrides):
  lowered = lower(program(variant, num_devices, *overrides))
  return collectives.count_lowered(lowered.as_text())


def found_in_evaluation(variant, num_devices):
  created = program(variant, num_devices)
  lowered = created.lower('eval_step', created.initial_state())
  return collectives.count_lowered(lowered.as_text())


def text():
  tables = {
    title: found(variant, 8, *overrides)
    for title, (variant, *overrides) in STEPS.items()
  }
  tables['bn_x5, mini, evaluation'] = found_in_evaluation('bn_x5', 8)
  lines = []
  for title, table in tables.items():
    lines += [f'{title}, 8 devices', '', *collectives.table(table), '']
  return '\n'.join(lines)


def test_collectives_are_those_listed():
  assert text() == WRITTEN.read_text()


def test_one_reduction_per_layer_and_direction():
  """In the list above, beyond those of the gradients and of the metrics."""

  def count_without_gradients(variant):
    _, section = WRITTEN.read_text().split(f'{variant}, mini, 8 devices\n')
    params = program(variant, 8).initial_state().params
    total = int(re.search(r'(\d+) in all', section)[1])
    return total - len(jax.tree.leaves(params))

  num_layers = 69
  assert count_without_gradients('bn_x5') == (
    2 * num_layers + count_without_gradients('inception')
  )


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_number_of_devices():
  for statistics in ('global', 'group', 'device'):
    overrides = (
      f'bn.statistics={statistics}',
      'bn.virtual_batch_size=4',
      'batch_size=64',
    )
    of_two, of_eight = (
      collectives.total_bytes(found('bn_x5', number, *overrides))
      for number in (2, 8)
    )
    assert of_two == of_eight


def test_bytes_of_arrays():
  both = collectives.Collective('all_reduce', ('8x8xf32', 'i32'))
  assert both.num_bytes() == 260


@pytest.fixture(params=['tiny', pytest.param('whole', marks=pytest.mark.slow)])
def network(request):
  """Overrides that choose a network."""
  return (TINY,) if request.param == 'tiny' else ()


@pytest.mark.parametrize('statistics', ['global', 'group', 'device'])
def test_bfloat16_is_reduced_in_float32(statistics):
  """Gradients, statistics, and the gradients of statistics."""
  kinds = {
    array.split('x')[-1]
    for each in found(
      'bn_x5', 8, TINY, 'model.dtype=bfloat16', f'bn.statistics={statistics}'
    )
    for array in each.arrays
  }
  assert kinds == {'f32', 'i32'}


def test_no_more_reductions_after_compiling_than_with_flax(network):
  ours = program('bn_baseline', 8, *network)
  flax_step = steps.with_flax_norm(ours).steps.train_steps
  counts = [
    collectives.count_compiled_all_reduces(
      step.lower(ours.initial_state(), ours.abstract_batch(1))
      .compile()
      .as_text()
    )
    for step in (ours.steps.train_steps, flax_step)
  ]
  assert 0 < counts[0] <= counts[1]


def test_one_device_reduces_nothing():
  assert not found('bn_x5', 1, TINY)


def test_cost_per_device_does_not_depend_on_their_number(network):
  """FLOPs and memory of a device at 8 images each."""
  flops, memory = [], []
  for number in (1, 8) if network else (1, 2, 4, 8):
    compiled = lower(
      program('bn_x5', number, f'batch_size={8 * number}', *network)
    ).compile()
    flops.append(compiled.cost_analysis()['flops'])
    analysis = compiled.memory_analysis()
    memory.append(
      analysis.temp_size_in_bytes
      + analysis.argument_size_in_bytes
      + analysis.output_size_in_bytes
      - analysis.alias_size_in_bytes
    )
  for amounts in (flops, memory):
    assert max(amounts) < 1.02 * min(amounts), amounts


if __name__ == '__main__':
  WRITTEN.write_text(text())
