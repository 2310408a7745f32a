"""Tests of the protocol for ImageNet, its commands and its tables."""

import json
import re
import shlex

import launch
import launch_arguments
import protocol
import pytest

from bn_repro import config as config_lib
from bn_repro import paper
from bn_repro.data import imagenet_metadata
from bn_repro.tpu import estimate, slices

TEXT = protocol.DOCUMENT.read_text()
SWEEPS = (protocol.ROOT / 'docs/sweeps.md').read_text()
CLOUD = (protocol.ROOT / 'docs/cloud.md').read_text()


def test_documents_are_up_to_date():
  """`python scripts/protocol.py` updates them; each block is in one of them."""
  texts = [path.read_text() for path in protocol.DOCUMENTS]
  for text in texts:
    assert protocol.fill_in(text) == text
  for name in protocol.BLOCKS:
    assert any(f'<!-- {name} -->' in text for text in texts)


def test_the_readme_has_the_claims_that_its_first_line_counts():
  """All that do not hold are about a network of the table."""
  failing = re.search(r'(\d+) do not hold', protocol.claims())[1]
  assert protocol.results().count('does not hold') == int(failing)


@pytest.mark.parametrize(
  'variant, cells',
  [
    # From the ledger, by hand.
    ('inception', ('31M', '72.2', '1x', '–')),
    ('bn_x5', ('14.8x', '73.0', '2.91x', 'faster than BN-Baseline: holds / u')),
    ('bn_x30', ('2.7M', '74.8', 'never', 'most accurate: does not hold')),
  ],
)
def test_rows_of_the_readme(variant, cells):
  (row,) = (r for r in protocol.results().splitlines() if f'`{variant}`' in r)
  assert f'(configs/{variant}.py)' in row
  for cell in cells:
    assert cell in row


def command_lines(text=TEXT):
  """Returns the commands of a document that take a config."""
  blocks = re.findall(r'```\n(.*?)```', text, re.DOTALL)
  lines = [line for block in blocks for line in block.splitlines()]
  return [line for line in lines if '--config=' in line]


def options(line):
  """Returns the config and the overrides of a command."""
  arguments = shlex.split(line)
  (config,) = (a for a in arguments if a.startswith('--config='))
  overrides = [
    a.removeprefix('--config.') for a in arguments if a.startswith('--config.')
  ]
  return config.removeprefix('--config='), overrides


def command_with(program, text):
  """Returns the only command of a document that runs a program."""
  (line,) = (line for line in command_lines(text) if program in line)
  return line


def test_launches_are_accepted(tmp_path, capsys):
  """Launch prints the words of slice.sh that cloud.md lists, in order."""
  for text in (CLOUD, TEXT):
    arguments = shlex.split(command_with('launch.py', text))[2:]
    assert launch.main([*arguments, f'--out={tmp_path / "out"}']) == 0
  printed = capsys.readouterr().out
  assert '375,000 steps of 512: 192,000,000 images, 149.9 epochs' in printed
  words = re.findall(r'slice\.sh (\w+)', printed)
  words = words[: len(words) // 2]
  of_cloud = CLOUD[CLOUD.index('slice.sh ...') :]
  assert re.findall(r'`(\w+)`', of_cloud)[: len(words)] == words
  script = (tmp_path / 'out' / 'slice.sh').read_text()
  for word in words:
    assert re.search(rf'^  ([a-z_]+ \| )*{word}( \| [a-z_]+)*\)', script, re.M)


def test_the_sweep_under_slurm(tmp_path, capsys):
  """It trains with the protocol's batch, and the cost is printed first."""
  (line,) = re.findall('^python scripts/launch.py slurm .*', SWEEPS, re.M)
  arguments = [*shlex.split(line)[2:], f'--out={tmp_path / "out"}']
  assert f'--config.batch_size={protocol.BATCH_SIZE}' in arguments
  assert launch.main(arguments) == 0
  said = capsys.readouterr().out
  found = re.search(r'^GPU-hours: ([\d,]+) to', said, re.M)[1]
  # 28 trials of 480 million images, 0.33 GB each.
  expected = 2 * 28 * 480e6 * 10.60e9 / 32 / 2.039e12 / 3600
  assert float(found.replace(',', '')) == pytest.approx(expected, rel=0.01)
  assert 'with 64 images per GPU' in said and 'take longer' not in said
  assert said.index('GPU-hours') < said.index('sbatch')


def test_the_checked_program_is_the_launched_one():
  """In both documents and in all examples of launch.py."""
  expected = set(protocol.overrides('bn_x30'))
  for text in (CLOUD, TEXT):
    line = command_with('compile_check.py', text)
    assert shlex.split(line) == protocol.Check('bn_x30', 'v5e:4x4').command()
    path, overrides = options(line)
    assert path == 'configs/bn_x30.py'
    assert {'batch_size=512', *overrides} == expected
  examples = launch_arguments.examples()
  for text in (CLOUD, TEXT):
    line = command_with('launch.py', text)
    assert shlex.split(line) == examples['tpu-vm']
  for example in examples.values():
    path, overrides = options(shlex.join(example))
    assert path == 'configs/bn_x30.py'
    assert {o for o in overrides if 'data_dir' not in o} == expected


def test_decoding_bounds_the_expected_time(monkeypatch):
  """Computed by hand: 512 images per call, on four hosts."""
  figures = {
    'memory': 0,
    'code': 0,
    'flops': 197e12 * 1e-3,  # A millisecond on a chip.
    'bytes_accessed': 0,
    'by_kind': {},
    'num_collectives': 0,
    'collective_bytes': 0,
  }
  check = {
    'topology': 'v5e:4x4',
    'num_devices': 16,
    'batch_size': 512,
    'steps': {'train_steps': figures, 'eval_step': figures},
    'calls': {'train_steps': 1000, 'eval_step': 100, 'statistics_step': 0},
  }
  monkeypatch.setattr(protocol, 'images_per_cpu', lambda: 800)
  hours = protocol._hours(check, 1000, 2, decoding=True)
  training = 1000 * 2e-3  # 512 / (4 * 112 * 800) is 1.4 ms.
  evaluation = 100 * 512 / (4 * 8 * 800)
  assert 3600 * hours == pytest.approx(training + evaluation)
  hours = protocol._hours(check, 1000, 1, decoding=True)
  assert 3600 * hours == pytest.approx(
    1000 * 512 / (4 * 112 * 800) + evaluation
  )
  assert 3600 * protocol._hours(check, 2000) == pytest.approx(2.2)


def test_final_learning_rates():
  """The text agrees with the schedule."""
  from bn_repro.training import optimizer

  for variant in protocol.VARIANTS:
    config = protocol.as_trained(variant)
    schedule = optimizer.create_schedule(
      config.optim, imagenet_metadata.NUM_EXAMPLES['train'] / config.batch_size
    )
    last = float(schedule(config.total_steps - 1))
    assert re.search(
      rf'{last:.2g} for [^;]*{paper.label(variant)}\b', protocol.last_rates()
    )


@pytest.mark.parametrize('variant', protocol.VARIANTS)
def test_overrides_keep_the_number_of_images(variant):
  """In total, between evaluations, and in the moving averages."""
  config = config_lib.load(f'configs/{variant}.py')
  ours = protocol.as_trained(variant)
  assert ours.total_steps * ours.batch_size == config.total_steps * 32
  assert ours.eval_every * ours.batch_size == config.eval_every * 32
  if config.bn.enabled:
    assert ours.bn.virtual_batch_size == paper.BATCH_SIZE
    assert ours.bn.momentum == pytest.approx(config.bn.momentum**16, abs=1e-4)
  config_lib.check_divides(ours, protocol.SLICE.num_chips)


def test_expected_accuracies_are_at_the_papers_steps():
  for row in paper.PAPER.values():
    if row.steps:
      step = round(row.steps * 1e6 * 32 / protocol.BATCH_SIZE)
      assert f'| {step:,} | {row.steps:g}M of 32 |' in TEXT
  epochs = 2_500 * protocol.BATCH_SIZE / imagenet_metadata.NUM_EXAMPLES['train']
  assert epochs == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
  'check', protocol.CHECKS, ids=lambda check: check.path.stem
)
def test_recorded_figures_are_of_their_programs(check):
  facts = json.loads(check.path.read_text())
  command = check.recorded_command()
  assert facts['command'] == shlex.join(command)
  path, overrides = options(facts['command'])
  (batch_size,) = (
    argument.removeprefix('--') for argument in command if 'batch_' in argument
  )
  config = config_lib.load(path, [*overrides, batch_size])
  resolved = config_lib.upgrade(facts['resolved_config'])
  assert resolved.to_dict() == estimate.resolve(config, 'tpu').to_dict()
  # Null where it was not recorded.
  assert 'git_revision' in facts
  assert facts['topology'] == check.topology
  assert facts['config'] == path == f'configs/{check.variant}.py'
  chips = slices.parse_slice(check.topology).num_chips
  assert (facts['num_devices'], facts['batch_size']) == (chips, 32 * chips)
  assert facts['dtype'] == 'bfloat16'
  assert facts['steps']['train_steps']['flops'] > 3e11
  assert facts['calls']['train_steps'] == config.total_steps
