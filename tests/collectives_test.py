"""Collectives of the training step, held against a text that is reviewed.

python tests/collectives_test.py writes the text anew.
"""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import pytest
from tiny import rows

from bn_repro import architecture, collectives, datasets, optim, parallel, steps
from bn_repro import config as config_lib
from bn_repro.program import create_program

WRITTEN = Path(__file__).with_name('collectives.txt')
VARIANTS = ('inception', 'bn_baseline', 'bn_x5')


def program(variant, num_devices, *overrides):
  config = config_lib.load(f'configs/{variant}.py:mini', overrides)
  mesh = parallel.create_mesh(jax.devices()[:num_devices])
  return create_program(config, datasets.check(config), mesh)


def lower(program):
  return program.train_steps.lower(
    program.initial_state(), program.abstract_batch(1)
  )


def found(variant, num_devices, *overrides):
  lowered = lower(program(variant, num_devices, *overrides))
  return collectives.of_lowered(lowered.as_text())


def text():
  lines = []
  for variant in VARIANTS:
    lines += [f'{variant}, mini, 8 devices', '']
    lines += [*collectives.table(found(variant, 8)), '']
  return '\n'.join(lines)


def test_collectives_are_those_that_are_written_down():
  assert text() == WRITTEN.read_text()


def test_one_reduction_a_layer_forward_and_one_backward():
  """Beside one for each gradient, and one for each sum of the metrics."""

  def besides_gradients(variant):
    params = program(variant, 8).initial_state().params
    return sum(found(variant, 8).values()) - len(jax.tree.leaves(params))

  num_layers = 69
  assert besides_gradients('bn_x5') == (
    2 * num_layers + besides_gradients('inception')
  )


@pytest.mark.slow
def test_bytes_do_not_grow_with_the_devices():
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


@pytest.fixture
def small_network(monkeypatch):
  monkeypatch.setattr(architecture, 'rows', rows)


def test_no_more_reductions_after_compiling_than_with_flax(small_network):
  ours = program('bn_baseline', 8)
  config = ours.config
  model = ours.model.clone(
    norm=functools.partial(
      nn.BatchNorm,
      momentum=config.bn.momentum,
      epsilon=config.bn.epsilon,
      axis_name=parallel.AXIS,
    )
  )
  optimizer = optim.create_optimizer(
    config.optim, config.batch_size, ours.schedule
  )
  flax_step = parallel.data_parallel(
    steps.several(steps.create_train_step(model, optimizer, config)),
    ours.mesh,
    donate_state=True,
    batch_axis=1,
  )
  counts = [
    collectives.of_compiled(
      step.lower(ours.initial_state(), ours.abstract_batch(1))
      .compile()
      .as_text()
    )
    for step in (ours.train_steps, flax_step)
  ]
  assert 0 < counts[0] <= counts[1]


def test_a_device_does_the_same_whatever_their_number(small_network):
  """FLOPs and memory of a device at 8 images each, for 1, 2, 4, 8 devices."""
  flops, memory = [], []
  for number in (1, 2, 4, 8):
    compiled = lower(
      program('bn_x5', number, f'batch_size={8 * number}')
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
