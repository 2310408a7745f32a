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
README = (protocol.ROOT / 'README.md').read_text()


def test_tables_are_those_of_the_code():
  """Python scripts/protocol.py writes them anew."""
  for name in protocol.BLOCKS:
    assert f'<!-- {name} -->' in TEXT
  assert protocol.written(TEXT) == TEXT


def command_lines(text=TEXT):
  """The commands of a document that take a config, a line each."""
  blocks = re.findall(r'```\n(.*?)```', text, re.DOTALL)
  lines = [line for block in blocks for line in block.splitlines()]
  return [line for line in lines if '--config=' in line]


def options(line):
  """Its config and overrides."""
  arguments = shlex.split(line)
  (config,) = (a for a in arguments if a.startswith('--config='))
  overrides = [
    a.removeprefix('--config.') for a in arguments if a.startswith('--config.')
  ]
  return config.removeprefix('--config='), overrides


def test_commands_can_be_typed():
  assert len(command_lines()) == len(protocol.VARIANTS) + 2
  of_readme = command_lines(README)
  assert len(of_readme) > 6
  for line in [*command_lines(), *of_readme]:
    config_lib.load(*options(line))


@pytest.mark.parametrize('text', [TEXT, README], ids=['protocol', 'README'])
def test_launches_are_accepted(text, tmp_path, capsys):
  """And what they print to be run is what the README says."""
  (line,) = (line for line in command_lines(text) if 'launch.py' in line)
  arguments = shlex.split(line)[2:]
  assert launch.main([*arguments, f'--out={tmp_path / "out"}']) == 0
  printed = capsys.readouterr().out
  words = re.findall(r'slice\.sh (\w+)', printed)
  of_readme = README[README.index('slice.sh ...') :]
  assert re.findall(r'`(\w+)`', of_readme)[: len(words)] == words
  script = (tmp_path / 'out' / 'slice.sh').read_text()
  for word in words:
    assert re.search(rf'^  ([a-z_]+ \| )*{word}( \| [a-z_]+)*\)', script, re.M)


def test_the_launch_is_that_of_the_table():
  (line,) = (line for line in command_lines() if 'launch.py' in line)
  path, overrides = options(line)
  expected = {*protocol.overrides('bn_x30'), 'data.data_dir=/mnt/data'}
  assert path == 'configs/bn_x30.py'
  assert set(overrides) == expected


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
