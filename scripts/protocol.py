"""Writes the generated parts of README.md and of the documents in docs/.

Examples:
  python scripts/protocol.py
    Writes tables and commands from the configs and `results/`.

  python scripts/protocol.py --compile
    First compiles the programs that have no file in results/compile_check,
    which takes one to two hours on two cores.

This module defines how each variant is trained on ImageNet. The commands, the
estimated costs, the deviations from the paper and the examples of launch.py are
all derived from it.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import json
from pathlib import Path
import re
import shlex
import subprocess
import sys
from typing import Any

from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bn_repro import cli, paper
from bn_repro import config as config_lib
from bn_repro.data import imagenet_metadata
from bn_repro.tpu import cost, slices

NUM_TRAIN = imagenet_metadata.NUM_EXAMPLES['train']

DOCUMENT = ROOT / 'docs' / 'imagenet.md'
README = ROOT / 'README.md'
# All documents that may have generated parts.
DOCUMENTS = (README, *sorted((ROOT / 'docs').glob('**/*.md')))
RESULTS = ROOT / 'results'
BENCHMARKS = RESULTS / 'benchmarks.json'
COSTS = RESULTS / 'compile_check'
# Folders of `results/` with all networks of section 4.2.
DATA_SETS = ('fashion_mnist', 'mnist_5k')

VARIANTS = ('inception', 'bn_baseline', 'bn_x5', 'bn_x30', 'bn_x5_sigmoid')
# Our choice: 16 chips with 32 images each, the paper's batch of a replica.
SLICE = slices.parse_slice('v5e:4x4')
BATCH_SIZE = 512
SCALE = BATCH_SIZE // paper.BATCH_SIZE
# CPUs of a host of four v5e chips. A process decodes with as many threads as
# it can use (configs/inception.py); there are enough processes for all CPUs.
CPUS_PER_HOST = 112
THREADS = 8
WORKERS = CPUS_PER_HOST // THREADS
# Peak rates of an A100 of 80 GB: operations in bfloat16, and bytes of HBM, a
# second (NVIDIA's data sheet, 2021).
A100_FLOPS = 312e12
A100_BYTES = 2_039e9


@dataclasses.dataclass(frozen=True)
class Check:
  """A program to compile.

  Attributes:
    variant: name of the config.
    topology: slice to compile for, such as v5e:4x4.
    extra: overrides in addition to those of the protocol; they turn BN off.
  """

  variant: str
  topology: str
  extra: tuple[str, ...] = ()

  @property
  def path(self) -> Path:
    """File of the figures."""
    slice_name = self.topology.replace(':', '-')
    bn = '.without_bn' if self.extra else ''
    return COSTS / f'{self.variant}.{slice_name}{bn}.json'

  def figures(self) -> dict[str, Any]:
    """Returns the recorded figures, an `Estimate` as JSON."""
    return json.loads(self.path.read_text())

  def command(self) -> list[str]:
    """Returns the command that compiles the program."""
    num_chips = slices.parse_slice(self.topology).num_chips
    return [
      *('python', 'scripts/compile_check.py'),
      f'--config=configs/{self.variant}.py',
      f'--topology={self.topology}',
      f'--batch_size={BATCH_SIZE * num_chips // SLICE.num_chips}',
      *(f'--config.{override}' for override in overrides(self.variant)[1:]),
      *(f'--config.{override}' for override in self.extra),
    ]

  def recorded_command(self) -> list[str]:
    """Returns the command that also records the figures."""
    return [*self.command(), f'--json={self.path.relative_to(ROOT)}']


WITHOUT_BN = Check('bn_x5', str(SLICE), ('bn.enabled=false',))
CHECKS = (
  Check('bn_x30', str(SLICE)),
  Check('bn_x30', 'v4:2x2x2'),
  WITHOUT_BN,
  Check('inception', str(SLICE)),
  Check('bn_baseline', str(SLICE)),
  Check('bn_x5_sigmoid', str(SLICE)),
)
# BN-x5 compiles to the program of BN-x30.
PROGRAM_OF = {'bn_x5': 'bn_x30'}


def overrides(variant: str) -> list[str]:
  """Returns the overrides that train a variant with a batch of 512.

  The number of images between evaluations, between checkpoints and in total is
  that of the config.
  """
  config = config_lib.load(variant)
  changed: dict[str, Any] = {
    'batch_size': BATCH_SIZE,
    'total_steps': config.total_steps // SCALE,
    'eval_every': config.eval_every // SCALE,
    'checkpoint_every': config.checkpoint_every // SCALE,
    'log_every': 125,
  }
  if config.bn.enabled:
    changed['bn.statistics'] = 'group'
    # The average keeps the same share of its past after the same images.
    changed['bn.momentum'] = round(config.bn.momentum**SCALE, 4)
  changed |= {'data.num_workers': WORKERS, 'data.num_threads': THREADS}
  return [f'{name}={value}' for name, value in changed.items()]


def as_trained(variant: str) -> ConfigDict:
  """Returns the config of a variant with its overrides."""
  return config_lib.load(variant, overrides(variant))


def training_arguments(
  variant: str, *, runs: str = 'gs://my-bucket/runs', data: str = '/mnt/data'
) -> list[str]:
  """Returns the arguments that select a variant, its workdir and its data."""
  return [
    f'--config=configs/{variant}.py',
    f'--workdir={runs}/{variant}',
    f'--config.data.data_dir={data}',
    *(f'--config.{override}' for override in overrides(variant)),
  ]


def launch_command() -> list[str]:
  """Returns the command that trains BN-x30 on a spot slice."""
  return [
    *('python', 'scripts/launch.py', 'tpu-vm', '--name=bn-x30'),
    *(f'--topology={SLICE}', '--spot', '--project=PROJECT'),
    *('--zone=us-west4-a', '--data_disk=imagenet'),
    *training_arguments('bn_x30'),
  ]


def _code_block(*commands: Sequence[str]) -> str:
  return '```\n' + '\n\n'.join(map(shlex.join, commands)) + '\n```'


def commands() -> str:
  """Returns the training command of each variant."""
  return _code_block(
    *(
      ['python', '-m', 'bn_repro.main', *training_arguments(variant)]
      for variant in VARIANTS
    )
  )


def prove() -> str:
  """Returns the command that checks, without a TPU, that BN-x30 fits."""
  return _code_block(Check('bn_x30', str(SLICE)).command())


def launch() -> str:
  """Returns the launch command as a code block."""
  return _code_block(launch_command())


def slurm_sweep() -> str:
  """Returns the command that trains a sweep under SLURM, as a code block.

  All trials are as long as BN-Baseline is trained.
  """
  return _code_block(
    [
      *('python', 'scripts/launch.py', 'slurm', '--name=lr', '--gpus=8'),
      '--sweep=configs/sweeps/lr_multipliers.py:full',
      '--workdir=/shared/runs/lr',
      *training_arguments(
        'bn_baseline', runs='/shared/runs', data='/shared/data'
      )[2:],
    ]
  )


def gpu_hours(images: float) -> tuple[float, float]:
  """Returns an estimate of the GPU-hours of training, from low to high.

  It is the roofline of an A100 for the operations and bytes of BN-x30, times
  `cost.EXPECTED_FACTORS`, and not measured.

  Args:
    images: images to train on, counted each time they are seen.
  """
  figures = _figures('bn_x30')
  step = figures['steps']['train_steps']
  seconds = max(step['flops'] / A100_FLOPS, step['bytes_accessed'] / A100_BYTES)
  per_image = seconds * figures['num_devices'] / figures['batch_size']
  low, high = (
    factor * images * per_image / 3600 for factor in cost.EXPECTED_FACTORS
  )
  return low, high


def _figures(variant: str) -> dict[str, Any]:
  return Check(PROGRAM_OF.get(variant, variant), str(SLICE)).figures()


def _min_seconds(step: dict[str, Any], figures: dict[str, Any]) -> float:
  """Returns the roofline lower bound on the time of a step."""
  chip = slices.parse_slice(figures['topology']).chip
  return cost.min_step_seconds(cost.Cost(**step), chip, figures['num_devices'])


def images_per_cpu() -> int:
  """Images that one CPU decodes in a second, rounded down to hundreds."""
  figures = json.loads(BENCHMARKS.read_text())['benchmarks']['input']['figures']
  (rate,) = (each['value'] for each in figures if each['name'] == 'ours')
  return 100 * int(rate / 100)


def _decoding_rate(cpus_per_host: int) -> int:
  """Returns the images that all hosts decode in a second."""
  return SLICE.num_hosts * cpus_per_host * images_per_cpu()


def _hours(
  figures: dict[str, Any],
  total_steps: int,
  factor: float = 1,
  *,
  decoding: bool = False,
) -> float:
  """Returns the hours of a run.

  Args:
    figures: recorded figures of its program.
    total_steps: training steps of the run.
    factor: time of a step in multiples of its lower bound.
    decoding: whether no step is faster than its images are decoded. Evaluation
      and Algorithm 2 decode in the training process alone.
  """
  seconds = 0.0
  for name, step in figures['steps'].items():
    step_seconds = factor * _min_seconds(step, figures)
    if decoding:
      cpus = CPUS_PER_HOST if name == 'train_steps' else THREADS
      step_seconds = max(
        step_seconds, figures['batch_size'] / _decoding_rate(cpus)
      )
    seconds += figures['calls'][name] * step_seconds
  # Evaluations are as frequent in a run of another length.
  return seconds * total_steps / figures['calls']['train_steps'] / 3600


def hosts() -> str:
  """Returns a comparison of the rates of decoding and training."""
  figures, config = _figures('bn_x30'), as_trained('bn_x30')
  step = _min_seconds(figures['steps']['train_steps'], figures)
  rate = BATCH_SIZE / step
  evaluations = config.total_steps // config.eval_every
  calls = sum(figures['calls'].values()) - figures['calls']['train_steps']
  evaluating = calls * BATCH_SIZE / _decoding_rate(THREADS)
  return (
    f'**Input.** At its lower bound BN-x30 trains on {rate:,.0f} images a '
    f'second, {rate / SLICE.num_hosts:,.0f} per host. A host has '
    f'{CPUS_PER_HOST} CPUs. One CPU of our machine decodes '
    f'{images_per_cpu():,} images a second (`python scripts/benchmark.py '
    f'input`), so the {WORKERS} processes of {THREADS} threads in the '
    'commands below should '
    f'decode {CPUS_PER_HOST * images_per_cpu():,}. Evaluation and Algorithm 2 '
    'decode in the training process alone, which cannot use more than '
    f'{THREADS} threads: at {THREADS * images_per_cpu():,} images a second per '
    f'host, each of {evaluations} evaluations takes at least '
    f'{evaluating / evaluations:.0f} seconds, {evaluating / 3600:.1f} hours in '
    'total.'
  )


def costs() -> str:
  """Returns the table of hours and chip-hours of each variant."""
  rows = [
    '| variant | steps of 512 | epochs | memory per chip | step, lower bound '
    '| run, lower bound | run, expected | chip-hours, expected |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for variant in VARIANTS:
    config, figures = as_trained(variant), _figures(variant)
    step = _min_seconds(figures['steps']['train_steps'], figures)
    hours = _hours(figures, config.total_steps)
    expected = [
      _hours(figures, config.total_steps, factor, decoding=True)
      for factor in cost.EXPECTED_FACTORS
    ]
    epochs = config.total_steps * BATCH_SIZE / NUM_TRAIN
    expected_hours = '-'.join(f'{each:.1f}' for each in expected)
    chip_hours = '-'.join(
      f'{each * figures["num_devices"]:.0f}' for each in expected
    )
    memory = max(each['memory'] for each in figures['steps'].values())
    rows.append(
      f'| {paper.label(variant)}{"*" if variant in PROGRAM_OF else ""} '
      f'| {config.total_steps:,} | {epochs:.0f} '
      f'| {memory / 1e9:.2f} GB | {1e3 * step:.2f} ms | {hours:.1f} h '
      f'| {expected_hours} h | {chip_hours} |'
    )
  rows += ['', '\\* BN-x5 and BN-x30 compile to the same program.']
  return '\n'.join(rows)


def compiled() -> str:
  """Returns the table of what the compiler reports of each program."""
  rows = [
    '| program | chips, batch | memory per chip | GFLOP | bytes accessed '
    '| HBM bytes | convolutions | BN | pooling | other | collectives, MB |',
    '|---|---|---|---|---|---|---|---|---|---|---|',
  ]
  versions = set()
  for check in CHECKS:
    figures = check.figures()
    step = figures['steps']['train_steps']
    kinds = step['by_kind']
    named = [kinds[kind] for kind in ('convolutions', 'BN', 'pooling')]
    hbm = sum(kinds.values())
    name = paper.label(check.variant) + (' without BN' if check.extra else '')
    cells = [f'{each / 1e9:.2f}' for each in (*named, hbm - sum(named))]
    rows.append(
      f'| {name} on {check.topology} '
      f'| {figures["num_devices"]}, {figures["batch_size"]} '
      f'| {step["memory"] / 1e9:.2f} GB | {step["flops"] / 1e9:.1f} '
      f'| {step["bytes_accessed"] / 1e9:.2f} GB | {hbm / 1e9:.2f} GB '
      f'| {" | ".join(cells)} '
      f'| {step["num_collectives"]}, {step["collective_bytes"] / 1e6:.1f} |'
    )
    versions.add(
      f'{figures["date"]}, jax {figures["versions"]["jax"]}, libtpu '
      f'{figures["libtpu"]}'
    )
  rows += [
    '',
    f'Per training step and chip. Compiled {"; ".join(sorted(versions))}.',
  ]
  return '\n'.join(rows)


def bn_bytes() -> str:
  """Returns the bytes that BN adds to a step, by kind of instruction."""
  with_bn, without = (
    check.figures()['steps']['train_steps']
    for check in (Check('bn_x30', str(SLICE)), WITHOUT_BN)
  )
  accessed = with_bn['bytes_accessed'] / without['bytes_accessed'] - 1
  kinds = [step['by_kind'] for step in (with_bn, without)]
  columns = [[*each.values(), sum(each.values())] for each in kinds]
  hbm = columns[0][-1] / columns[1][-1] - 1
  rows = [
    f'| HBM bytes, GB | {" | ".join(kinds[0])} | all |',
    '|---' * (len(kinds[0]) + 2) + '|',
  ]
  columns.append([a - b for a, b in zip(*columns, strict=True)])
  for title, column in zip(
    ('with BN', 'without BN', 'difference'), columns, strict=True
  ):
    # Adding 0 turns -0.0 into 0.0.
    cells = ' | '.join(f'{round(value / 1e9, 2) + 0:.2f}' for value in column)
    rows.append(f'| {title} | {cells} |')
  return (
    f'With BN a step accesses {accessed:.1%} more bytes than without '
    f'({with_bn["bytes_accessed"] / 1e9:.2f} against '
    f'{without["bytes_accessed"] / 1e9:.2f} GB), and {hbm:.1%} more in HBM:'
    '\n\n' + '\n'.join(rows)
  )


def deviations() -> str:
  """Returns the table of differences from the paper."""
  rows = [
    '| | paper | this protocol |',
    '|---|---|---|',
    '| updates | asynchronous, from many replicas | synchronous |',
    f'| batch | 32 per replica | {BATCH_SIZE} per step |',
    '| learning rate | for a batch of 32 | '
    f'times {SCALE}, in proportion to the batch |',
    '| BN statistics | over the 32 images of a replica | over groups of 32 '
    'images (`bn.statistics=group`), without a collective |',
    '| moving averages | not given | momentum '
    f'{as_trained("bn_x30").bn.momentum} per step; accuracies are quoted with '
    'population statistics (Algorithm 2) |',
    '| learning rate decay | exponential; constants not given | staircase, in '
    'epochs; see each config |',
    '| photometric distortions, crops, initial weights, L2 | not given | see '
    '`configs/inception.py` |',
  ]
  for variant in VARIANTS:
    row, config = paper.PAPER[variant], as_trained(variant)
    steps = f'{row.steps}M to 72.2 %' if row.steps else 'not given'
    ours = config.total_steps * SCALE / 1e6
    rows.append(
      f'| duration of {row.label}, in steps of 32 | {steps} | {ours:g}M |'
    )
  return '\n'.join(rows)


def last_rates() -> str:
  """Returns the final learning rate of each variant, relative to the first."""
  ends: dict[str, list[str]] = {}
  for variant in VARIANTS:
    config = as_trained(variant)
    epochs = config.total_steps * BATCH_SIZE / NUM_TRAIN
    decays = int(epochs / config.optim.decay_epochs)
    rate = f'{config.optim.decay_rate**decays:.2g}'
    ends.setdefault(rate, []).append(paper.label(variant))
  of_each = '; '.join(
    f'{rate} for {", ".join(labels)}' for rate, labels in ends.items()
  )
  return (
    '- **Otherwise** train to the end. The last gains in accuracy come late, '
    'as the learning rate decays to a fraction of its initial value: '
    f'{of_each}.'
  )


def benchmarks() -> str:
  """Returns the table of all benchmarks but `tpu`, and where they ran."""
  from benchmarks import record  # Imports JAX.

  contents = json.loads(BENCHMARKS.read_text())
  machine = contents['machine']
  versions = ', '.join(f'{k} {v}' for k, v in machine['versions'].items())
  names = [name for name in contents['benchmarks'] if name != 'tpu']
  return (
    f'{record.table(contents, names)}\n\n'
    f'Measured on {machine["cores"]} cores of an {machine["processor"]} '
    f'({machine["system"]}), with {versions}. "In use before" is the share of '
    'the CPUs that other programs used when the benchmark started.'
  )


def bn_peers() -> str:
  """Returns the table of the benchmark `tpu`."""
  from benchmarks import record  # Imports JAX.

  return record.matrix(json.loads(BENCHMARKS.read_text()), 'tpu')


def claims() -> str:
  """Returns how many claims hold."""
  first, _, _ = (RESULTS / 'report/ledger.md').read_text().partition('\n')
  return f'**{first}**'


def _published(*names: str) -> list[Any]:
  """Returns the sections of folders of `results/`."""
  from bn_repro.report import runs as runs_lib  # NumPy takes a moment.
  from bn_repro.report import sections as sections_lib

  runs, _ = runs_lib.read_runs([str(RESULTS / name) for name in names])
  sections, _ = sections_lib.group(runs)
  return sections


def _to_markdown(rows: Sequence[dict[str, str]]) -> str:
  lines = [list(rows[0]), ['---'] * len(rows[0]), *(r.values() for r in rows)]
  return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def evidence() -> str:
  """Returns a table of the published networks, on all data sets."""
  from bn_repro.report import tables

  return _to_markdown(tables.networks(_published(*DATA_SETS)))


def results() -> str:
  """Returns the table of the README: networks, their paper's and our results.

  Its verdicts are those of the claims that are about one network.
  """
  from bn_repro.report import tables

  # The digits as two instruction sets compute them.
  sections = _published(*DATA_SETS, 'mnist_5k_avx2')
  verdicts = _verdicts(sections)
  rows = []
  networks = tables.networks(sections[:1])
  for variant, cells in zip(paper.FIG_3, networks, strict=True):
    _, speed, accuracy, our_speed, our_accuracy = cells.values()
    steps = paper.PAPER[variant].steps
    fewer = '' if variant == 'inception' else f' ({speed} fewer)'
    rows.append(
      {
        'config': f'[`{variant}`](configs/{variant}.py)',
        'paper: steps to 72.2 %': f'{steps:g}M{fewer}' if steps else 'never',
        'paper: best, %': accuracy,
        'ours: fewer steps': our_speed,
        'ours: accuracy, %': our_accuracy,
        'holds?': '<br>'.join(verdicts[variant]) or '–',
      }
    )
  return _to_markdown(rows)


def _verdicts(sections: Sequence[Any]) -> dict[str, list[str]]:
  """Returns the verdicts of each claim about a network, by the network.

  As in the first line of the ledger, the digits count once, and a verdict is
  undecided if another instruction set gives another one.
  """
  from bn_repro.report import claims as claims_lib
  from bn_repro.report import ledger

  rows = claims_lib.judge(sections)
  cells = ledger.cells(row for row in rows if row.data)
  found: dict[str, list[str]] = {variant: [] for variant in paper.FIG_3}
  for claim in claims_lib.CLAIMS:
    verdicts = [
      ledger.verdict_of(rows)
      for (text, _), rows in cells.items()
      if text == claim.text
    ]
    if verdicts:
      found[claim.subject].append(f'{claim.short}: {" / ".join(verdicts)}')
  return found


def _conclusions(sweep: str) -> list[str]:
  """Returns what the published summary of a sweep concludes, by lines."""
  summary = (RESULTS / sweep / 'summary.md').read_text()
  return [line[2:] for line in summary.splitlines() if line.startswith('- ')]


def lr_multipliers() -> str:
  """Returns what the sweep of learning rates prints."""
  return '\n'.join(['```text', *_conclusions('lr_multipliers'), '```'])


def init_scale() -> str:
  """Returns what the sweep of the scale of the initial weights prints."""
  return '\n'.join(['```text', *_conclusions('init_scale')[:-1], '```'])


def section_421() -> str:
  """Returns which items of section 4.2.1 the published sweep settles."""
  found = re.findall(
    r'(\w+) (undecided|[\d.]+ points (?:below|above)) \((.*?)\)',
    ' '.join(_conclusions('section_421')),
  )
  settled = [
    f'`{name}` {difference} ({interval})'
    for name, difference, interval in found
    if difference != 'undecided'
  ]
  return (
    f'Five seeds settle {len(settled)} of its {len(found)} changes:\n'
    + ';\n'.join(settled)
    + '.'
  )


def ensemble() -> str:
  """Returns the accuracies of the published ensemble and its members."""
  from bn_repro.report import fig_4

  (section,) = _published('ensemble')
  ((result,), _) = fig_4.read(section)
  assert result.ensemble is not None
  members = [result.networks[name].accuracy for name in result.members]
  return (
    f'On {result.images}, the members reach {100 * min(members):.1f} to '
    f'{100 * max(members):.1f} %,\nand all six together '
    f'{100 * result.ensemble.accuracy:.1f} %.'
  )


BLOCKS: dict[str, Callable[[], str]] = {
  'benchmarks': benchmarks,
  'bn_peers': bn_peers,
  'commands': commands,
  'prove': prove,
  'launch': launch,
  'slurm_sweep': slurm_sweep,
  'hosts': hosts,
  'last_rates': last_rates,
  'costs': costs,
  'compiled': compiled,
  'bn_bytes': bn_bytes,
  'deviations': deviations,
  'claims': claims,
  'results': results,
  'evidence': evidence,
  'lr_multipliers': lr_multipliers,
  'section_421': section_421,
  'init_scale': init_scale,
  'ensemble': ensemble,
}


def fill_in(text: str) -> str:
  """Returns a document with its generated blocks replaced."""

  def replace(match: re.Match[str]) -> str:
    name = match['name']
    return f'<!-- {name} -->\n{BLOCKS[name]()}\n<!-- end of {name} -->'

  return re.sub(
    r'<!-- (?P<name>\w+) -->\n.*?<!-- end of (?P=name) -->',
    replace,
    text,
    flags=re.DOTALL,
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--compile', action='store_true', help='compile the missing programs first'
  )
  flags = parser.parse_args(argv)
  for check in CHECKS if flags.compile else ():
    if not check.path.exists():
      command = check.recorded_command()
      print(f'+ {shlex.join(command)}', flush=True)
      code = subprocess.run(
        [sys.executable, *command[1:]], cwd=ROOT, check=False
      ).returncode
      if code:
        return code
  for document in DOCUMENTS:
    text = document.read_text()
    if (filled := fill_in(text)) != text:
      document.write_text(filled)
      print(f'wrote {document.relative_to(ROOT)}')
  return 0


if __name__ == '__main__':
  sys.exit(cli.run(main))
