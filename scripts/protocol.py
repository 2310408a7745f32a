"""Writes tables and commands into docs/imagenet.md and README.md.

  python scripts/protocol.py            from configs and results/compile_check
  python scripts/protocol.py --compile  compiles first what is not there yet: an
                                        hour or two of two cores

What a variant is trained with on ImageNet stands here once: what is proved,
what is launched, the costs and the deviations come from it.
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

from bn_repro import config as config_lib
from bn_repro import paper
from bn_repro.data import imagenet_metadata
from bn_repro.tpu import cost, slices

NUM_TRAIN = imagenet_metadata.NUM_EXAMPLES['train']

DOCUMENT = ROOT / 'docs' / 'imagenet.md'
README = ROOT / 'README.md'
COSTS = ROOT / 'results' / 'compile_check'

VARIANTS = ('inception', 'bn_baseline', 'bn_x5', 'bn_x30', 'bn_x5_sigmoid')
# 16 chips with the paper's 32 images each; all our choice.
SLICE = 'v5e:4x4'
BATCH_SIZE = 512
SCALE = BATCH_SIZE // paper.BATCH_SIZE
# Of a host of four chips of v5e. Each process decodes with as many threads as
# are of use (configs/inception.py), and there are processes for all CPUs.
CPUS = 112
THREADS = 8
WORKERS = CPUS // THREADS
# A second, of one CPU, as `benchmark.py input` found it on ours.
IMAGES_A_CPU = 800


@dataclasses.dataclass(frozen=True)
class Check:
  """A program to compile: a variant for a slice, BN on or off."""

  variant: str
  topology: str
  extra: tuple[str, ...] = ()

  @property
  def path(self) -> Path:
    """Where its figures are kept."""
    slice_name = self.topology.replace(':', '-')
    bn = '.without_bn' if self.extra else ''
    return COSTS / f'{self.variant}.{slice_name}{bn}.json'

  def command(self) -> list[str]:
    """Compiles it."""
    chips = slices.parse_slice(self.topology).num_chips
    batch = BATCH_SIZE * chips // slices.parse_slice(SLICE).num_chips
    return [
      *('python', 'scripts/compile_check.py'),
      f'--config=configs/{self.variant}.py',
      f'--topology={self.topology}',
      f'--batch_size={batch}',
      *(f'--config.{override}' for override in overrides(self.variant)[1:]),
      *(f'--config.{override}' for override in self.extra),
    ]

  def recorded_command(self) -> list[str]:
    """Compiles it and writes the figures."""
    return [*self.command(), f'--json={self.path.relative_to(ROOT)}']


WITHOUT_BN = Check('bn_x5', SLICE, ('bn.enabled=false',))
CHECKS = (
  Check('bn_x30', SLICE),
  Check('bn_x30', 'v4:2x2x2'),
  WITHOUT_BN,
  Check('inception', SLICE),
  Check('bn_baseline', SLICE),
  Check('bn_x5_sigmoid', SLICE),
)
# BN-x5 is the same program.
PROGRAM_OF = {'bn_x5': 'bn_x30'}


def overrides(variant: str) -> list[str]:
  """What is changed of a config for a batch of 512; steps are fewer by that."""
  config = config_lib.load(str(ROOT / 'configs' / f'{variant}.py'))
  changed: dict[str, Any] = {
    'batch_size': BATCH_SIZE,
    'total_steps': config.total_steps // SCALE,
    'eval_every': config.eval_every // SCALE,
    'checkpoint_every': config.checkpoint_every // SCALE,
    'log_every': 125,
  }
  if config.bn.enabled:
    changed['bn.statistics'] = 'group'
    # As much of the old average after as many images.
    changed['bn.momentum'] = round(config.bn.momentum**SCALE, 4)
  changed |= {'data.num_workers': WORKERS, 'data.num_threads': THREADS}
  return [f'{name}={value}' for name, value in changed.items()]


def as_trained(variant: str) -> ConfigDict:
  """The config of the protocol."""
  return config_lib.load(
    str(ROOT / 'configs' / f'{variant}.py'), overrides(variant)
  )


def found(check: Check) -> dict[str, Any]:
  """The figures of a program, as compiled once."""
  return json.loads(check.path.read_text())


def _typed(*commands: Sequence[str]) -> str:
  return '```\n' + '\n\n'.join(map(shlex.join, commands)) + '\n```'


def _training(variant: str) -> list[str]:
  """The arguments that say what is trained, on the disk of the data."""
  return [
    f'--config=configs/{variant}.py',
    f'--workdir=/mnt/runs/{variant}',
    '--config.data.data_dir=/mnt/data',
    *(f'--config.{override}' for override in overrides(variant)),
  ]


def commands() -> str:
  """What to type for each variant."""
  return _typed(
    *(
      ['python', '-m', 'bn_repro.main', *_training(variant)]
      for variant in VARIANTS
    )
  )


def prove() -> str:
  """What to type to see, without a TPU, that BN-x30 fits."""
  return _typed(Check('bn_x30', SLICE).command())


def launch() -> str:
  """What to type to train BN-x30 on a spot slice."""
  return _typed(
    [
      *('python', 'scripts/launch.py', 'tpu-vm', '--name=bn-x30'),
      *(f'--topology={SLICE}', '--spot', '--project=PROJECT'),
      *('--zone=us-west4-a', '--workdir_mount=10.0.0.2:/runs'),
      *('--data_disk=imagenet', *_training('bn_x30')),
    ]
  )


def _of_variant(variant: str) -> dict[str, Any]:
  return found(Check(PROGRAM_OF.get(variant, variant), SLICE))


def _least_seconds(step: dict[str, Any], check: dict[str, Any]) -> float:
  """The roofline of a step."""
  chip = slices.parse_slice(check['topology']).chip
  return cost.least_step_seconds(cost.Cost(**step), chip, check['num_devices'])


def _decoded(cpus: int) -> int:
  """Images a second of all hosts, with so many CPUs of each."""
  return slices.parse_slice(SLICE).num_hosts * cpus * IMAGES_A_CPU


def _hours(
  check: dict[str, Any],
  total_steps: int,
  factor: float = 1,
  *,
  decoding: bool = False,
) -> float:
  """Hours of a run on chips that take so many times the least.

  With `decoding` no step is faster than its images are decoded: those of
  evaluations and of Algorithm 2 by the training process alone.
  """
  seconds = 0.0
  for name, figures in check['steps'].items():
    step = factor * _least_seconds(figures, check)
    if decoding:
      cpus = CPUS if name == 'train_steps' else THREADS
      step = max(step, check['batch_size'] / _decoded(cpus))
    seconds += check['calls'][name] * step
  # Evaluations come as often in a run of another length.
  return seconds * total_steps / check['calls']['train_steps'] / 3600


def hosts() -> str:
  """Whether the hosts decode as fast as the chips train."""
  check, config = _of_variant('bn_x30'), as_trained('bn_x30')
  num_hosts = slices.parse_slice(SLICE).num_hosts
  step = _least_seconds(check['steps']['train_steps'], check)
  taken = BATCH_SIZE / step
  evaluations = config.total_steps // config.eval_every
  calls = sum(check['calls'].values()) - check['calls']['train_steps']
  evaluating = calls * BATCH_SIZE / _decoded(THREADS)
  return (
    f'**The hosts.** At its least time BN-x30 takes {taken:,.0f} images a '
    f'second, {taken / num_hosts:,.0f} a host. A host has {CPUS} CPUs, and '
    f'one of ours decodes {IMAGES_A_CPU} (`python scripts/benchmark.py '
    f'input`): {WORKERS} processes of {THREADS} threads, as in the commands '
    f'below, should make {CPUS * IMAGES_A_CPU:,}. Evaluation and Algorithm 2 '
    'decode in the training process alone, in which more than '
    f'{THREADS} threads are of no use: at {THREADS * IMAGES_A_CPU:,} a host '
    f'each of {evaluations} evaluations takes '
    f'{evaluating / evaluations:.0f} seconds at the least, '
    f'{evaluating / 3600:.1f} hours in all.'
  )


def costs() -> str:
  """Hours and chip-hours of each variant."""
  rows = [
    '| variant | steps of 512 | epochs | memory a chip | a step, at the least '
    '| the run, at the least | expect | chip-hours |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for variant in VARIANTS:
    config, check = as_trained(variant), _of_variant(variant)
    step = _least_seconds(check['steps']['train_steps'], check)
    hours = _hours(check, config.total_steps)
    expected = [
      _hours(check, config.total_steps, factor, decoding=True)
      for factor in cost.SLOWER
    ]
    epochs = config.total_steps * BATCH_SIZE / NUM_TRAIN
    expect = '-'.join(f'{each:.1f}' for each in expected)
    chip_hours = '-'.join(
      f'{each * check["num_devices"]:.0f}' for each in expected
    )
    memory = max(each['memory'] for each in check['steps'].values())
    rows.append(
      f'| {paper.label(variant)}{"*" if variant in PROGRAM_OF else ""} '
      f'| {config.total_steps:,} | {epochs:.0f} '
      f'| {memory / 1e9:.2f} GB | {1e3 * step:.2f} ms | {hours:.1f} h '
      f'| {expect} h | {chip_hours} |'
    )
  rows += ['', "\\* The program of BN-x30, which is BN-x5's as well."]
  return '\n'.join(rows)


def compiled() -> str:
  """What the compiler said of each program."""
  rows = [
    '| program | chips, batch | memory a chip | GFLOP | bytes, all | bytes of '
    'HBM | convolutions | BN | pooling | other | messages, MB |',
    '|---|---|---|---|---|---|---|---|---|---|---|',
  ]
  versions = set()
  for check in CHECKS:
    facts = found(check)
    step, kinds = (
      facts['steps']['train_steps'],
      facts['steps']['train_steps']['by_kind'],
    )
    main = sum(kinds.values())
    named = ('convolutions', 'BN', 'pooling')
    other = main - sum(kinds[kind] for kind in named)
    name = paper.label(check.variant) + (' without BN' if check.extra else '')
    cells = [f'{kinds[kind] / 1e9:.2f}' for kind in named]
    rows.append(
      f'| {name} on {check.topology} | {facts["num_devices"]}, '
      f'{facts["batch_size"]} | {step["memory"] / 1e9:.2f} GB '
      f'| {step["flops"] / 1e9:.1f} | {step["bytes_accessed"] / 1e9:.2f} GB '
      f'| {main / 1e9:.2f} GB | {" | ".join(cells)} | {other / 1e9:.2f} '
      f'| {step["num_collectives"]}, {step["collective_bytes"] / 1e6:.1f} |'
    )
    versions.add(
      f'{facts["date"]}, jax {facts["versions"]["jax"]}, libtpu '
      f'{facts["libtpu"]}'
    )
  rows += [
    '',
    f'A training step, a chip. Compiled {"; ".join(sorted(versions))}.',
  ]
  return '\n'.join(rows)


def bn_bytes() -> str:
  """What BN costs in bytes, over the same network without it."""
  with_bn, without = (
    found(check)['steps']['train_steps']
    for check in (Check('bn_x30', SLICE), WITHOUT_BN)
  )
  everywhere = with_bn['bytes_accessed'] / without['bytes_accessed'] - 1
  kinds = [step['by_kind'] for step in (with_bn, without)]
  columns = [[*each.values(), sum(each.values())] for each in kinds]
  main = columns[0][-1] / columns[1][-1] - 1
  rows = [
    f'| bytes of HBM, GB | {" | ".join(kinds[0])} | all |',
    '|---' * (len(kinds[0]) + 2) + '|',
  ]
  columns.append([a - b for a, b in zip(*columns, strict=True)])
  for title, column in zip(
    ('with BN', 'without', 'difference'), columns, strict=True
  ):
    # Adding 0 makes -0 of it 0.
    cells = ' | '.join(f'{round(value / 1e9, 2) + 0:.2f}' for value in column)
    rows.append(f'| {title} | {cells} |')
  return (
    f'With BN a step accesses {everywhere:.1%} more bytes than without '
    f'({with_bn["bytes_accessed"] / 1e9:.2f} against '
    f'{without["bytes_accessed"] / 1e9:.2f} GB), and {main:.1%} more of HBM:'
    '\n\n' + '\n'.join(rows)
  )


def deviations() -> str:
  """What differs from the paper, variant by variant."""
  rows = [
    '| | the paper | here |',
    '|---|---|---|',
    '| updates | asynchronous, of many replicas | synchronous |',
    f'| batch | 32 a replica | {BATCH_SIZE}, in one step |',
    '| learning rate | for a batch of 32 | '
    f'times {SCALE}, in proportion to the batch |',
    '| statistics of BN | each replica its 32 images | groups of 32 images '
    '(`bn.statistics=group`), which no message takes |',
    '| moving averages | not given | '
    f'{as_trained("bn_x30").bn.momentum} of the old one a step; numbers are '
    'quoted with population statistics (Algorithm 2) |',
    '| decay of the rate | exponential; constants not given | staircase, in '
    'epochs: see each config |',
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
  """How far the learning rates have decayed at the end of each run."""
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
    '- Otherwise run to the end: the rate decays to a share of the first '
    f'({of_each}), and the last points come late.'
  )


BLOCKS: dict[str, Callable[[], str]] = {
  'commands': commands,
  'prove': prove,
  'launch': launch,
  'hosts': hosts,
  'last_rates': last_rates,
  'costs': costs,
  'compiled': compiled,
  'bn_bytes': bn_bytes,
  'deviations': deviations,
}


def written(text: str) -> str:
  """The document with each generated part made anew."""

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
  parser.add_argument('--compile', action='store_true', help='see above')
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
  for document in (DOCUMENT, README):
    document.write_text(written(document.read_text()))
    print(f'wrote {document.relative_to(ROOT)}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
