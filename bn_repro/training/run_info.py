"""Facts about each start of a run, for `run.json` and the first lines."""

from collections.abc import Callable
import datetime
from importlib import metadata
import os
from pathlib import Path
import platform
import shlex
import subprocess
import sys
from typing import Any

from bn_repro import __version__, host, numerics
from bn_repro import config as config_lib
from bn_repro.models import summary
from bn_repro.runtime.workdir import Status, Workdir
from bn_repro.training import optimizer
from bn_repro.training.experiment import Experiment

# Packages that results depend on.
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

# All files but those that runs of this code write.
_CODE = ('.', ':!results')


def identity(experiment: Experiment) -> dict[str, Any]:
  """What a checkpoint must share with the run that resumes from it."""
  return {
    'config_digest': config_lib.digest(experiment.config),
    'data_fingerprint': experiment.dataset.fingerprint,
    'compute_type': str(experiment.model.dtype),
    'images_per_statistic': images_per_statistic(experiment),
  }


def write_start(
  experiment: Experiment,
  workdir: Workdir,
  step: int,
  config_file: str,
  say: Callable[[str], None],
) -> None:
  """Writes config, facts and status of a start, and prints the main facts.

  Args:
    experiment: the run.
    workdir: where `config.json`, `run.json` and `status.json` are written.
    step: the step that the run starts or resumes from.
    config_file: value of --config.
    say: prints a line.
  """
  rows = summary.layers(
    experiment.model, experiment.dataset.image_shape, depth=1
  )
  facts = {
    'config_file': config_file,
    'num_parameters': sum(row.parameters for row in rows),
    # Of the forward pass, for one image.
    'multiply_adds': sum(row.multiply_adds for row in rows),
    'start_step': step,
    # An installed package has no revision.
    'version': __version__,
    'git_revision': git_revision(say),
    'numerics': numerics.digest(),
    **_facts(experiment),
  }
  workdir.write_config(experiment.config)
  previous = workdir.write_run(facts)
  workdir.write_status(Status.RUNNING, step, 'in progress')
  batch_size = experiment.config.batch_size
  for line in summary.table(rows):
    say(line)
  say(
    f'devices: {", ".join(facts["devices"])}; '
    f'{facts["num_parameters"]:,} parameters; learning rate '
    f'{facts["applied_learning_rate"]:g} at batch size {batch_size}'
  )
  if facts['images_per_statistic']:
    groups = batch_size // facts['images_per_statistic']
    say(
      f'BN over {facts["images_per_statistic"]} images in {groups} '
      f'group{"s" if groups > 1 else ""}'
    )
  if step:
    say(f'resuming from the checkpoint of step {step}')
  elif previous is not None:
    say('no checkpoint yet: starting again from step 0')
  if previous is not None:
    for package, version in facts['versions'].items():
      previous_version = previous['versions'].get(package)
      if previous_version != version:
        say(
          f'warning: {package} is {version} now and was {previous_version}; '
          'the resumed run may not be bit for bit equal'
        )


def versions() -> dict[str, str]:
  """The versions of Python and of the packages that results depend on."""
  return {
    'python': platform.python_version(),
    **{package: metadata.version(package) for package in PACKAGES},
  }


def _facts(experiment: Experiment) -> dict[str, Any]:
  return {
    # Without the path of the interpreter.
    'command': shlex.join(['python', *sys.orig_argv[1:]]),
    'started': datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds'),
    'versions': versions(),
    # Runs are equal bit for bit only if these are equal.
    'cpu_count': host.num_cores(),
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
    'devices': [device.device_kind for device in experiment.mesh.devices.flat],
    'applied_learning_rate': optimizer.applied_learning_rate(
      experiment.config.optim, experiment.config.batch_size
    ),
    'images_per_statistic': images_per_statistic(experiment),
    'data_fingerprint': experiment.dataset.fingerprint,
    'num_classes': experiment.dataset.num_classes,
    'num_examples': {
      name: len(split) for name, split in experiment.dataset.splits.items()
    },
  }


def images_per_statistic(experiment: Experiment) -> int:
  """The number of images that a BN statistic is computed over; 0 without BN."""
  config = experiment.config
  if not config.bn.enabled:
    return 0
  return {
    'global': config.batch_size,
    'device': config.batch_size // experiment.mesh.devices.size,
    'group': config.bn.virtual_batch_size,
  }[config.bn.statistics]


def _git(root: Path, *command: str) -> tuple[str, str]:
  """What git prints about a checkout; and its error, or ''."""
  # The environment may name another repository, and git would search the
  # folders above.
  environment = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith('GIT_')
  }
  try:
    result = subprocess.run(
      ['git', f'--git-dir={root}/.git', f'--work-tree={root}', *command],
      cwd=root,
      env=environment,
      capture_output=True,
      text=True,
      timeout=10,
      check=False,
    )
  except (OSError, subprocess.TimeoutExpired) as error:
    return '', str(error)
  return result.stdout.strip(), result.stderr.strip()


def git_revision(say: Callable[[str], None]) -> str:
  """The git revision of the code, with '-dirty' if it is changed.

  A copy without history, such as one sent to a TPU host, has the revision in a
  file `REVISION`.

  Args:
    say: prints a line; called with a warning if a checkout or copy has neither.

  Returns:
    40 hexadecimal digits, or what `REVISION` contains; '' if it is unknown.
  """
  root = config_lib.ROOT
  if root is None:  # Installed, as a package that has a version.
    return ''
  # The owner of the repository does not matter: its code runs already.
  revision, reason = _git(root, 'rev-parse', '--verify', 'HEAD')
  # Another repository, whose folder the code was copied into, is not meant.
  if revision and not _git(root, 'ls-files', 'bn_repro')[0]:
    revision, reason = '', 'the repository does not track bn_repro'
  if revision and _git(root, 'diff', '--name-only', 'HEAD', '--', *_CODE)[0]:
    revision += '-dirty'
  written = root / 'REVISION'
  if not revision and written.is_file():
    revision = written.read_text().strip()
  if not revision:
    say(
      'warning: the git revision of the code is unknown and not recorded '
      f'({" ".join(reason.split())})'
    )
  return revision
