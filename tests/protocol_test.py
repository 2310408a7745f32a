"""The protocol for ImageNet: commands that load, and tables of the code."""

import json
from pathlib import Path
import re
import shlex
import sys

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'scripts'))

import launch
import protocol

from bn_repro import config as config_lib
from bn_repro import ilsvrc2012, paper, tpu

TEXT = protocol.DOCUMENT.read_text()


def test_tables_are_those_of_the_code():
  """Python scripts/protocol.py writes them anew."""
  for name in protocol.BLOCKS:
    assert f'<!-- {name} -->' in TEXT
  assert protocol.written(TEXT) == TEXT


def command_lines():
  """The commands of the document, each in a line of its own."""
  blocks = re.findall(r'```\n(.*?)```', TEXT, re.DOTALL)
  return [line for block in blocks for line in block.splitlines() if line]


def options(line):
  """Its config and overrides."""
  arguments = shlex.split(line)
  (config,) = (a for a in arguments if a.startswith('--config='))
  overrides = [
    a.removeprefix('--config.') for a in arguments if a.startswith('--config.')
  ]
  return config.removeprefix('--config='), overrides


def test_commands_can_be_typed():
  lines = [line for line in command_lines() if '--config=' in line]
  assert len(lines) == len(protocol.VARIANTS) + 2
  for line in lines:
    config_lib.load(*options(line))


def test_the_launch_is_that_of_the_table(tmp_path):
  """The same fields, and a launch that is accepted."""
  (line,) = (line for line in command_lines() if 'launch.py' in line)
  path, overrides = options(line)
  expected = {*protocol.overrides('bn_x30'), 'data.data_dir=/mnt/data'}
  assert path == 'configs/bn_x30.py'
  assert set(overrides) == expected
  arguments = shlex.split(line)[2:]
  assert launch.main([*arguments, f'--out={tmp_path / "out"}']) == 0


@pytest.mark.parametrize('variant', protocol.VARIANTS)
def test_as_many_images_as_the_config_says(variant):
  """Fewer steps of more images, and averages over as many images."""
  config = config_lib.load(f'configs/{variant}.py')
  ours = protocol.as_trained(variant)
  assert ours.total_steps * ours.batch_size == config.total_steps * 32
  assert ours.eval_every * ours.batch_size == config.eval_every * 32
  if config.bn.enabled:
    assert ours.bn.virtual_batch_size == paper.BATCH_SIZE
    assert ours.bn.momentum == pytest.approx(config.bn.momentum**16, abs=1e-4)
  config_lib.check_divides(ours, tpu.parse_slice(protocol.SLICE).num_chips)


def test_steps_of_the_paper_are_those_of_the_table():
  for row in paper.PAPER.values():
    if row.steps:
      step = round(row.steps * 1e6 * 32 / protocol.BATCH_SIZE)
      assert f'| {step:,} | {row.steps:g}M of 32 |' in TEXT
  epochs = 2_500 * protocol.BATCH_SIZE / ilsvrc2012.NUM_EXAMPLES['train']
  assert epochs == pytest.approx(1, abs=0.01)


def test_figures_are_of_the_programs_they_are_said_to_be():
  for check in protocol.CHECKS:
    facts = json.loads(check.path.read_text())
    assert facts['topology'] == check.topology
    assert facts['config'] == f'configs/{check.variant}.py'
    chips = tpu.parse_slice(check.topology).num_chips
    assert (facts['num_devices'], facts['batch_size']) == (chips, 32 * chips)
    assert facts['dtype'] == 'bfloat16'
    assert facts['steps']['train_steps']['flops'] > 3e11
