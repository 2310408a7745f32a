"""What is known about a start of a run: `run.json`, and the first lines."""

from collections.abc import Callable
import datetime
from importlib import metadata
import os
import platform
import shlex
import subprocess
import sys
from typing import Any

from bn_repro import config as config_lib
from bn_repro.models import summary
from bn_repro.runtime.workdir import Workdir
from bn_repro.training import optimizer
from bn_repro.training.experiment import Program

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'ml_collections',
  'numpy',
)


def announce(
  program: Program,
  workdir: Workdir,
  step: int,
  config_file: str,
  say: Callable[[str], None],
) -> None:
  """Writes `run.json` and says what is about to run."""
  rows = summary.layers(program.model, program.dataset.image_shape, depth=1)
  facts = {
    'config_file': config_file,
    'num_parameters': sum(row.parameters for row in rows),
    'start_step': step,
    **_facts(program),
  }
  previous = workdir.write_run(facts)
  for line in summary.table(rows):
    say(line)
  say(
    f'devices: {", ".join(facts["devices"])}; '
    f'{facts["num_parameters"]:,} parameters; learning rate '
    f'{facts["applied_learning_rate"]:g} at batch size '
    f'{program.config.batch_size}'
  )
  if facts['images_per_statistic']:
    groups = program.config.batch_size // facts['images_per_statistic']
    say(
      f'BN over {facts["images_per_statistic"]} images in {groups} '
      f'group{"s" if groups > 1 else ""}'
    )
  if step:
    say(f'going on from the checkpoint of step {step}')
  elif previous is not None:
    say('no checkpoint yet: starting again from step 0')
  if previous is not None:
    for package, version in facts['versions'].items():
      before = previous['versions'].get(package)
      if before != version:
        say(
          f'warning: {package} is {version} now and was {before}; the run may '
          'not go on bit for bit'
        )


def versions() -> dict[str, str]:
  """The versions of Python and of the packages that results depend on."""
  return {
    'python': platform.python_version(),
    **{package: metadata.version(package) for package in PACKAGES},
  }


def _facts(program: Program) -> dict[str, Any]:
  return {
    # Where the interpreter lies is of no use elsewhere.
    'command': shlex.join(['python', *sys.orig_argv[1:]]),
    'started': datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds'),
    'git_revision': git_revision(),
    'versions': versions(),
    # The same numbers to the last bit take the same of these.
    'cpu_count': os.cpu_count(),
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
    'devices': [device.device_kind for device in program.mesh.devices.flat],
    'applied_learning_rate': optimizer.applied_learning_rate(
      program.config.optim, program.config.batch_size
    ),
    'images_per_statistic': images_per_statistic(program),
    'data_fingerprint': program.dataset.fingerprint(),
    'num_examples': {
      name: len(split) for name, split in program.dataset.splits.items()
    },
  }


def images_per_statistic(program: Program) -> int:
  """How many images a BN statistic is computed over; 0 without BN."""
  config = program.config
  if not config.bn.enabled:
    return 0
  return {
    'global': config.batch_size,
    'device': config.batch_size // program.mesh.devices.size,
    'group': config.bn.virtual_batch_size,
  }[config.bn.statistics]


def git_revision() -> str:
  """The revision of the code, '-dirty' if changed, '' if nobody knows.

  A copy without its history, as a rented host gets it, has it in a file.
  """
  root = config_lib.ROOT
  if root is None:
    return ''
  written = root / 'REVISION'
  if written.is_file():
    return written.read_text().strip()
  try:
    result = subprocess.run(
      [
        'git',
        '-C',
        str(root),
        'describe',
        '--always',
        '--dirty',
        '--abbrev=40',
      ],
      capture_output=True,
      text=True,
      timeout=10,
      check=False,
    )
  except (OSError, subprocess.TimeoutExpired):
    return ''
  return result.stdout.strip()
