"""The arguments of launch.py, and its examples."""

import argparse
from collections.abc import Callable, Sequence
import re
import shlex
import textwrap
from typing import Any

import protocol

from bn_repro import cli, files
from bn_repro.tpu import slices

_DESCRIPTION = """\
Writes scripts that train a config, or a sweep, on rented hardware. Read them,
then run the commands that are printed; --run also runs those that start the
training.
"""
_NOTES = """
The training command is restarted after exit code 75 (preempted and saved) and
after it is killed, but not after 0 (done), 1 (failed) or 3 (diverged); see
scripts/train_loop.sh. Several hosts share one workdir. On TPUs it may be in a
bucket, gs://BUCKET/NAME, to which the service account of the hosts can write
(roles/storage.objectUser). Otherwise --workdir_mount mounts an NFS share, such
as Filestore, on the folder above it.

--sweep=configs/sweeps/NAME.py:full in place of --config trains a sweep: as a
job array with SLURM, as one managed job per trial with SkyPilot, or one trial
after another on a TPU VM of one host.

SkyPilot and TPU VMs get the files that git tracks, and the config or sweep that
is named.
"""


def examples() -> dict[str, list[str]]:
  """Returns, for each place, the command that trains the protocol's BN-x30."""
  program = ('python', 'scripts/launch.py')
  return {
    'tpu-vm': protocol.launch_command(),
    'sky': [
      *(*program, 'sky', '--name=bn-x30', f'--topology={protocol.SLICE}'),
      '--data_bucket=gs://my-imagenet',
      *protocol.training_arguments('bn_x30'),
    ],
    'slurm': [
      *(*program, 'slurm', '--name=bn-x30', '--nodes=2', '--gpus=8'),
      *('--cpus_per_gpu=14', '--sbatch=--partition=gpu'),
      *protocol.training_arguments(
        'bn_x30', runs='/shared/runs', data='/shared/data'
      ),
    ],
  }


def _matching(pattern: str, form: str) -> Callable[[str], str]:
  """Returns the type of an argument that has to match a pattern.

  It refuses control characters, which could begin a line of a written file.
  """
  expression = re.compile(pattern)

  def check(text: str) -> str:
    if not (text.isprintable() and expression.fullmatch(text)):
      raise argparse.ArgumentTypeError(f'{text!r} is not of the form {form}')
    return text

  return check


def _add_options(
  add: Callable[..., Any], flag: str, of: str, such_as: str
) -> None:
  """Adds an argument that passes options on to another program."""
  add(
    flag,
    action='append',
    default=[],
    type=_matching('-.+', '--OPTION or --OPTION=VALUE'),
    metavar='OPTION',
    help=f'further option of {of}, such as {flag}={such_as}; may be repeated',
  )


def _add_slice_arguments(add: Callable[..., Any]) -> None:
  """Adds the arguments that `tpu-vm` and `sky` have in common."""
  add(
    '--topology',
    required=True,
    type=slices.parse_slice,
    help='TPU slice, such as v5e:4x4',
  )
  add(
    '--source',
    default='',
    type=_matching('([^#]+#[^#]+)?', 'URL#REVISION'),
    metavar='URL#REVISION',
    help='git repository that the hosts clone, such as '
    'https://example.org/bn#main (default: a copy of this working tree)',
  )
  add(
    '--workdir_mount',
    default='',
    type=_matching('([^:]+:/.*)?', 'SERVER:/SHARE'),
    metavar='SERVER:/SHARE',
    help='NFS share to mount on the folder above the workdir, such as '
    '10.0.0.2:/runs',
  )
  add(
    '--shared_workdir',
    action='store_true',
    help='the workdir is on shared storage that you mount yourself',
  )


def _add_tpu_vm_arguments(add: Callable[..., Any]) -> None:
  _add_slice_arguments(add)
  add(
    '--project',
    required=True,
    type=_matching('.+', 'NAME'),
    help='Google Cloud project',
  )
  add(
    '--zone',
    required=True,
    type=_matching('.+', 'NAME'),
    help='zone, such as us-west4-a',
  )
  add(
    '--spot',
    action='store_true',
    help='request a spot slice: cheaper, and may be preempted at any time',
  )
  add(
    '--data_disk',
    dest='data',
    default='',
    metavar='DISK',
    type=_matching('.*', 'DISK'),
    help='disk to mount read-only on config.data.data_dir, such as imagenet',
  )
  _add_options(add, '--gcloud', 'gcloud, to create the slice', '--network=NAME')
  _add_options(add, '--gcloud_ssh', "gcloud's ssh and scp", '--internal-ip')


def _add_sky_arguments(add: Callable[..., Any]) -> None:
  _add_slice_arguments(add)
  add(
    '--infra',
    default='gcp',
    type=_matching('gcp(/[^/]+){0,2}', 'gcp/REGION/ZONE'),
    help='gcp or gcp/REGION/ZONE, such as gcp/us-west4 (default: gcp)',
  )
  add(
    '--data_bucket',
    dest='data',
    default='',
    type=_matching('(gs://.+)?', 'gs://BUCKET'),
    metavar='gs://BUCKET',
    help='bucket to mount on config.data.data_dir',
  )


def _add_slurm_arguments(add: Callable[..., Any]) -> None:
  add('--nodes', type=cli.positive, default=1, help='nodes (default: 1)')
  add('--gpus', type=cli.positive, default=1, help='GPUs per node (default: 1)')
  add(
    '--tasks',
    choices=('node', 'gpu'),
    default='node',
    help='one process per node or per GPU (default: node)',
  )
  add(
    '--cpus_per_gpu',
    type=cli.positive,
    default=8,
    help='CPUs per GPU (default: 8)',
  )
  _add_options(add, '--sbatch', 'sbatch', '--time=12:00:00')


def _shown(command: Sequence[str]) -> str:
  """Formats an example for `--help`, over several lines."""
  lines = textwrap.wrap(
    shlex.join(command), 74, break_long_words=False, break_on_hyphens=False
  )
  return '\n  ' + ' \\\n    '.join(lines) + '\n'


def create_parser() -> argparse.ArgumentParser:
  """Returns the parser of the arguments, with a subparser for each place."""
  options: dict[str, Any] = {
    'formatter_class': argparse.RawDescriptionHelpFormatter,
    'allow_abbrev': False,
  }
  shown = {place: _shown(command) for place, command in examples().items()}
  parser = cli.Parser(
    description=_DESCRIPTION,
    epilog=f'examples:{"".join(shown.values())}{_NOTES}',
    **options,
  )
  places = parser.add_subparsers(dest='place', required=True, metavar='PLACE')
  for place, hardware, add_arguments in (
    (
      'tpu-vm',
      'a slice of Cloud TPU VMs, created with gcloud',
      _add_tpu_vm_arguments,
    ),
    (
      'sky',
      'a spot slice that SkyPilot recreates after preemptions',
      _add_sky_arguments,
    ),
    ('slurm', 'GPU nodes, as a SLURM batch job', _add_slurm_arguments),
  ):
    one = places.add_parser(
      place,
      help=hardware,
      description=f'Trains on {hardware}.',
      epilog=f'example:{shown[place]}{_NOTES}',
      **options,
    )
    add = one.add_argument
    add('--name', required=True, help='name of the launch, such as bn-x30')
    cli.add_config_arguments(one, required=False)
    cli.add_sweep_arguments(one, required=False)
    add(
      '--workdir',
      required=True,
      metavar='DIR',
      help='absolute path on the hosts, such as /mnt/runs/bn_x30, or on TPUs '
      'gs://BUCKET/NAME',
    )
    files.add_path_argument(
      one,
      '--out',
      help='folder to write (default: launch/NAME)',
    )
    add(
      '--run',
      action='store_true',
      help='also run the commands that start the training',
    )
    add_arguments(add)
  return parser
