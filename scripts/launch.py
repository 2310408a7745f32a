"""Writes the files that train on rented hardware, and runs them if asked.

The files are meant to be read: they are those of `scripts/launch/` with their
settings filled in. A `Job` is what runs; one function per place turns it into a
`Launch`. Mistakes are reported before anything is written, without JAX.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
from pathlib import Path
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from typing import Any

from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import protocol

from bn_repro import cli
from bn_repro import config as config_lib
from bn_repro.data import imagenet_metadata
from bn_repro.errors import UserError
from bn_repro.sweep import grid
from bn_repro.tpu import slices

_DESCRIPTION = """\
Writes scripts that train a config, or a sweep, on rented hardware. Read them,
then run the commands that are printed; --run also runs those that start the
training.
"""
_NOTES = """
The training command is restarted after exit code 75 (preempted and saved) and
after it is killed, but not after 0 (done), 1 (failed) or 3 (diverged); see
scripts/train_loop.sh. Several hosts share one workdir. On TPUs,
--workdir_mount mounts an NFS share, such as Filestore, on the folder above it.

--sweep=configs/sweeps/NAME.py:full in place of --config trains a sweep: as a
job array with SLURM, as one managed job per trial with SkyPilot, or one trial
after another on a TPU VM of one host.
"""


def examples() -> dict[str, list[str]]:
  """Returns, for each place, the command that trains the protocol's BN-x30."""
  program = ('python', 'scripts/launch.py')
  return {
    'tpu-vm': protocol.launch_command(),
    'sky': [
      *(*program, 'sky', '--name=bn-x30', f'--topology={protocol.SLICE}'),
      *('--workdir_mount=10.0.0.2:/runs', '--data_bucket=gs://BUCKET'),
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


@dataclasses.dataclass(frozen=True)
class Job:
  """What runs on every host, in the repository.

  Attributes:
    name: name of the launch.
    command: training command.
    workdir: workdir on the hosts.
    data_dir: folder of the data set on the hosts; may be empty.
    num_trials: number of trials of a sweep, otherwise 0. With `--trial=NUMBER`
      appended, the command trains one of them.
  """

  name: str
  command: tuple[str, ...]
  workdir: str
  data_dir: str
  num_trials: int


@dataclasses.dataclass(frozen=True)
class Launch:
  """How a job is run.

  Attributes:
    files: content of each file, by name.
    tools: programs that the commands call.
    commands: pairs of a command and what it does, in order.
    num_to_start: number of commands, from the first, that start the training.
  """

  files: Mapping[str, str]
  tools: Sequence[str]
  commands: Sequence[tuple[str, str]]
  num_to_start: int


def create_job(
  flags: argparse.Namespace, axes: Sequence[str], overrides: Sequence[str]
) -> tuple[Job, list[ConfigDict]]:
  """Returns the job, and the configs that it trains.

  Args:
    flags: parsed arguments.
    axes: `axis=values` of each `--sweep.axis`.
    overrides: `key=value` of each `--config.key`.

  Raises:
    UserError: if an argument is invalid.
  """
  name, workdir = flags.name, flags.workdir
  if not re.fullmatch('[a-z]([-a-z0-9]{0,48}[a-z0-9])?', name):
    raise UserError(
      f'--name={name}: use at most 50 lower-case letters, digits and hyphens, '
      'starting with a letter and not ending with a hyphen.'
    )
  # The folder above the workdir, on which a share is mounted, must not be /.
  if not re.match('/[^/]+/+[^/]', workdir):
    raise UserError(
      f'--workdir={workdir}: use an absolute path on the hosts, in a folder, '
      f'such as /mnt/runs/{name}.'
    )
  configs = _load_configs(flags, axes, overrides)
  data_dir = configs[0].data.data_dir
  if data_dir and not data_dir.startswith('/'):
    raise UserError(
      f'--config.data.data_dir={data_dir}: use an absolute path on the hosts, '
      'such as /mnt/data.'
    )
  files = (
    ('--sweep', flags.sweep, config_lib.CONFIGS / 'sweeps'),
    ('--config', flags.config, config_lib.CONFIGS),
  )
  command = (
    *('python', '-m', f'bn_repro.{"sweep" if flags.sweep else "main"}'),
    *(_in_repository(*file) for file in files if file[1]),
    f'--workdir={workdir}',
    *(f'--sweep.{axis}' for axis in axes),
    *(f'--config.{override}' for override in overrides),
  )
  num_trials = len(configs) if flags.sweep else 0
  return Job(name, command, workdir, data_dir, num_trials), configs


def _load_configs(
  flags: argparse.Namespace, axes: Sequence[str], overrides: Sequence[str]
) -> list[ConfigDict]:
  """Returns the config, or those of all trials of the sweep."""
  if flags.sweep:
    sweep = grid.load(flags.sweep, axes, flags.config or '', overrides)
    return [trial.config for trial in sweep.trials]
  if flags.config:
    return [config_lib.load(flags.config, overrides)]
  raise UserError('nothing to train. Give --config or --sweep.')


def _in_repository(flag: str, spec: str, folder: Path) -> str:
  """Returns an argument that names a file, relative to the repository.

  Args:
    flag: name of the argument.
    spec: path of the file, or its name in `folder`, with an optional `:mode`.
    folder: folder of the shipped files.

  Raises:
    UserError: if the file is outside the repository.
  """
  name, colon, mode = spec.partition(':')
  path = config_lib.find_file(flag, name, folder).resolve()
  if not path.is_relative_to(ROOT):
    raise UserError(
      f'{flag}={name}: is outside the repository, and the hosts get only the '
      'repository. Move it into configs/.'
    )
  return f'{flag}={path.relative_to(ROOT)}{colon}{mode}'


def check_devices(configs: Sequence[ConfigDict], num_devices: int) -> None:
  """Checks that configs can be trained on a number of TPUs or GPUs.

  Raises:
    UserError: if one cannot.
  """
  problems = []
  for config in configs:
    if config.model.dtype == 'float64':
      problems.append(
        'config.model.dtype=float64: TPUs have no float64, and GPUs are slow '
        'at it; it is for comparing numbers on CPUs. Use auto.'
      )
    try:
      config_lib.check_divides(config, num_devices)
    except UserError as error:
      problems += error.problems
  if problems:
    raise UserError(*dict.fromkeys(problems))


def check_storage(
  job: Job, config: ConfigDict, flags: argparse.Namespace
) -> None:
  """Checks that the hosts of a slice can read the data and keep the run.

  Raises:
    UserError: if they cannot.
  """
  problems = []
  if not job.data_dir and (
    flags.data or config.data.name in imagenet_metadata.NAMES
  ):
    problems.append(
      '--config.data.data_dir: must name the folder of the data on the hosts, '
      'such as /mnt/data.'
    )
  hosts, spot = flags.topology.num_hosts, flags.place == 'sky' or flags.spot
  if (hosts > 1 or spot) and not (flags.workdir_mount or flags.shared_workdir):
    why = (
      f'{hosts} hosts must share it'
      if hosts > 1
      else 'it must outlive a preempted spot slice'
    )
    problems.append(
      f'--workdir={job.workdir}: {why}. Give --workdir_mount=SERVER:/SHARE, or '
      '--shared_workdir if you mount the share yourself.'
    )
  if problems:
    raise UserError(*problems)


def _fill(template: str, render: Callable[[str], str]) -> str:
  """Returns a file of `scripts/launch/` with its `@marks@` filled in."""
  text = (ROOT / 'scripts' / 'launch' / template).read_text()
  return re.sub(r'@(\w+)@', lambda match: render(match[1]), text)


def _script(template: str, values: Mapping[str, Any]) -> str:
  """Returns a shell script; a tuple becomes the items of an array."""

  def render(mark: str) -> str:
    value = values[mark]
    if isinstance(value, tuple):
      return ''.join(f'\n  {_quote(item)}' for item in value) + '\n'
    return _quote(value)

  return _fill(template, render)


def _quote(value: Any) -> str:
  return shlex.quote(str(value))


def _slice_values(job: Job, flags: argparse.Namespace) -> dict[str, Any]:
  """Returns the settings that `tpu_vm` and `sky` have in common."""
  url, _, revision = flags.source.rpartition('#')
  return {
    **vars(flags),
    **vars(job),
    'accelerator_type': flags.topology.accelerator_type,
    'runtime_version': flags.topology.chip.runtime_version,
    'num_hosts': str(flags.topology.num_hosts),
    'url': url,
    'revision': revision,
  }


def tpu_vm(job: Job, flags: argparse.Namespace, folder: str) -> Launch:
  """Launches a job on Cloud TPU VMs, created as a queued resource.

  Trials of a sweep run there one after another.

  Raises:
    UserError: for a sweep on several hosts.
  """
  hosts = flags.topology.num_hosts
  if job.num_trials:
    if hosts > 1:
      raise UserError(
        f'--topology={flags.topology}: has {hosts} hosts, but a sweep runs on '
        'one. Use a slice of one host, or sky, which gives each trial a slice.'
      )
    job = dataclasses.replace(job, command=(*job.command, '--jobs=1'))
  values = {
    **_slice_values(job, flags),
    'source': 'git' if flags.source else 'local',
    'spot': 'yes' if flags.spot else 'no',
  }
  script = f'bash {_quote(folder)}/slice.sh'
  return Launch(
    files={name: _script(name, values) for name in ('slice.sh', 'host.sh')},
    tools=('gcloud',),
    commands=(
      (f'{script} create', 'requests the slice and waits for it'),
      (f'{script} set_up', 'copies, mounts and installs on all hosts'),
      (f'{script} train', 'starts the training loop on all hosts'),
      (f'{script} keep', 'watches, and recreates a preempted slice'),
      (f'{script} state', 'prints the state of the slice and its hosts'),
      (f'{script} logs', 'follows the log of host 0'),
      (f'{script} stop', 'saves and stops'),
      (f'{script} delete', 'deletes the slice, which is billed until then'),
    ),
    num_to_start=3,
  )


def sky(job: Job, flags: argparse.Namespace, folder: str) -> Launch:
  """Launches a job, or each trial of a sweep, as a managed job of SkyPilot."""
  path = f'{_quote(folder)}/sky.yaml'
  each, name, number = '{}', job.name, ''
  if job.num_trials:
    last = job.num_trials - 1
    each = f'(for trial in $(seq 0 {last}); do {{}} || exit; done)'
    name = f'{job.name}-$trial'
    number = f'--name {name} --env TRIAL=$trial '
  # A copy of the repository has no history to describe.
  revision = (
    ''
    if flags.source
    else '--env "REVISION=$(git describe --always --dirty --abbrev=40)" '
  )
  start = f'sky jobs launch --yes --detach-run {number}{revision}{path}'
  first = name.replace('$trial', '0')
  return Launch(
    files={'sky.yaml': _sky_task(job, flags)},
    tools=('sky', 'gcloud'),
    commands=(
      (each.format(start), 'starts it'),
      ('sky jobs queue', 'prints its state'),
      (f'sky jobs logs --name {first}', 'follows its log'),
      (each.format(f'sky jobs cancel --yes --name {name}'), 'cancels it'),
      *_comparison(job),
    ),
    num_to_start=1,
  )


def _sky_task(job: Job, flags: argparse.Namespace) -> str:
  values = _slice_values(job, flags)
  mount = {job.data_dir: {'source': flags.data, 'mode': 'MOUNT'}}
  values |= {
    'accelerators': f'tpu-{values["accelerator_type"]}',
    'file_mounts': mount if flags.data else {},
    'source': {'url': values['url'], 'ref': values['revision']}
    if flags.source
    else '.',
  }
  # YAML removes the two spaces of indentation from a block.
  command = ' \\\n    '.join(
    _quote(item).replace('\n', '\n  ') for item in job.command
  )

  def render(mark: str) -> str:
    # JSON is valid YAML.
    return command if mark == 'command' else json.dumps(values[mark])

  return _fill('sky.yaml', render)


def slurm(job: Job, flags: argparse.Namespace, folder: str) -> Launch:
  """Launches a job as a SLURM batch job, or a sweep as a job array."""
  tasks = 1 if flags.tasks == 'node' else flags.gpus
  values = {
    **vars(flags),
    **vars(job),
    'tasks_per_node': tasks,
    'cpus_per_task': flags.cpus_per_gpu * flags.gpus // tasks,
    'output': f'{folder}/%j.log',
  }
  array = [f'--array=0-{job.num_trials - 1}'] if job.num_trials else []
  submit = shlex.join(['sbatch', *array, *flags.sbatch, f'{folder}/job.sh'])
  return Launch(
    files={'job.sh': _script('job.sh', values)},
    tools=('sbatch',),
    commands=(
      (submit, 'submits the job'),
      (f'squeue --name={job.name}', 'prints its state'),
      (f'tail -F {_quote(folder)}/*.log', 'follows its log'),
      (f'scancel --name={job.name}', 'cancels it'),
      *_comparison(job),
    ),
    num_to_start=1,
  )


def _comparison(job: Job) -> list[tuple[str, str]]:
  """Returns the command that compares trials run by separate jobs."""
  if not job.num_trials:
    return []
  command = shlex.join([*job.command, '--compare'])
  return [(command, 'compares the trials; run it where the workdir is')]


def create_launch(
  job: Job,
  configs: Sequence[ConfigDict],
  flags: argparse.Namespace,
  folder: str,
) -> Launch:
  """Returns the launch of a job, its files to be written to `folder`.

  Raises:
    UserError: if the place does not suit the job.
  """
  if flags.place == 'slurm':
    check_devices(configs, flags.nodes * flags.gpus)
  else:
    check_devices(configs, flags.topology.num_chips)
    check_storage(job, configs[0], flags)
  return flags.wrap(job, flags, folder)


def training_length(config: ConfigDict) -> str:
  """Returns the steps, images and epochs of a run, as far as known."""
  if not config.total_steps:
    return f'{config.total_epochs:g} epochs'
  num_examples = None
  # The sizes of other data sets are known only once they are loaded.
  if config.data.name == imagenet_metadata.NAME:
    total = imagenet_metadata.NUM_EXAMPLES['train']
    num_examples = total - config.data.holdout
  return cli.describe_length(
    config.total_steps, config.batch_size, num_examples
  )


def check_tools(tools: Sequence[str]) -> None:
  """Checks that programs are installed, and that gcloud has credentials.

  Raises:
    UserError: if one is missing.
  """
  for tool in tools:
    if shutil.which(tool) is None:
      raise UserError(
        f'{tool}: not found. Install it, or omit --run and run the commands '
        'where it is installed.'
      )
  if 'gcloud' in tools:
    asked = subprocess.run(
      ['gcloud', 'auth', 'print-access-token'],
      capture_output=True,
      text=True,
      check=False,
    )
    if asked.returncode:
      reason = ' '.join(asked.stderr.split())[:200]
      raise UserError(f'gcloud has no credentials ({reason}). Run: gcloud init')


def write(files: Mapping[str, str], out: Path) -> None:
  """Writes the files of a launch.

  Raises:
    UserError: if the folder holds another launch, or the packed code of one,
      which a recreated slice still needs.
  """
  for name in ('slice.sh', 'host.sh', 'sky.yaml', 'job.sh'):
    path = out / name
    if path.exists() and path.read_bytes() != files.get(name, '').encode():
      raise UserError(
        f'--out={out}: its {name} belongs to another launch. Delete it, or use '
        'another folder.'
      )
  if (out / 'source.tgz').exists():
    raise UserError(
      f'--out={out}: its source.tgz is the code of a launch that was set up. '
      'Use the scripts there, or delete it.'
    )
  out.mkdir(parents=True, exist_ok=True)
  for name, text in files.items():
    (out / name).write_text(text)


def _not_empty(text: str) -> str:
  if not text:
    raise argparse.ArgumentTypeError('must not be empty')
  return text


def _matching(pattern: str, form: str) -> Callable[[str], str]:
  """Returns the type of an argument that has to match a pattern, or is ''."""

  def check(text: str) -> str:
    if text and not re.fullmatch(pattern, text):
      raise argparse.ArgumentTypeError(f"'{text}' is not of the form {form}")
    return text

  return check


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
    type=_matching('[^#]+#[^#]+', 'URL#REVISION'),
    metavar='URL#REVISION',
    help='git repository that the hosts clone, such as '
    'https://example.org/bn#main (default: a copy of this working tree)',
  )
  add(
    '--workdir_mount',
    default='',
    type=_matching('[^:]+:/.*', 'SERVER:/SHARE'),
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
  add('--project', required=True, type=_not_empty, help='Google Cloud project')
  add('--zone', required=True, type=_not_empty, help='zone, such as us-west4-a')
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
    help='disk to mount read-only on config.data.data_dir, such as imagenet',
  )


def _add_sky_arguments(add: Callable[..., Any]) -> None:
  _add_slice_arguments(add)
  add(
    '--infra',
    default='gcp',
    help='gcp or gcp/REGION/ZONE, such as gcp/us-west4 (default: gcp)',
  )
  add(
    '--data_bucket',
    dest='data',
    default='',
    type=_matching('gs://.+', 'gs://BUCKET'),
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
  add(
    '--sbatch',
    action='append',
    default=[],
    metavar='OPTION',
    help='further option of sbatch, such as --sbatch=--time=12:00:00; may be '
    'repeated',
  )


def _shown(command: Sequence[str]) -> str:
  """Formats an example for `--help`, over several lines."""
  lines = textwrap.wrap(
    shlex.join(command), 74, break_long_words=False, break_on_hyphens=False
  )
  return '\n  ' + ' \\\n    '.join(lines) + '\n'


def _create_parser() -> argparse.ArgumentParser:
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
  for place, hardware, add_arguments, wrap in (
    (
      'tpu-vm',
      'a slice of Cloud TPU VMs, created with gcloud',
      _add_tpu_vm_arguments,
      tpu_vm,
    ),
    (
      'sky',
      'a spot slice that SkyPilot recreates after preemptions',
      _add_sky_arguments,
      sky,
    ),
    ('slurm', 'GPU nodes, as a SLURM batch job', _add_slurm_arguments, slurm),
  ):
    one = places.add_parser(
      place,
      help=hardware,
      description=f'Trains on {hardware}.',
      epilog=f'example:{shown[place]}{_NOTES}',
      **options,
    )
    one.set_defaults(wrap=wrap)
    add = one.add_argument
    add('--name', required=True, help='name of the launch, such as bn-x30')
    cli.add_config_arguments(one, required=False)
    cli.add_sweep_arguments(one, required=False)
    add(
      '--workdir',
      required=True,
      metavar='DIR',
      help='absolute path on the hosts, such as /mnt/runs/bn_x30',
    )
    add('--out', metavar='DIR', help='folder to write (default: launch/NAME)')
    add(
      '--run',
      action='store_true',
      help='also run the commands that start the training',
    )
    add_arguments(add)
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  try:
    flags, axes, overrides = cli.parse_sweep_arguments(
      sys.argv[1:] if argv is None else argv, _create_parser()
    )
    out = Path(flags.out or ROOT / 'launch' / flags.name).absolute()
    inside = out.is_relative_to(ROOT)
    folder = str(out.relative_to(ROOT) if inside else out)
    job, configs = create_job(flags, axes, overrides)
    launch = create_launch(job, configs, flags, folder)
    if flags.run:
      check_tools(launch.tools)
    write(launch.files, out)
  except UserError as error:
    return cli.report_errors(error.problems)
  except OSError as error:
    return cli.report_errors([str(error)])
  print(f'wrote {", ".join(f"{folder}/{name}" for name in launch.files)}')
  trials = f'{job.num_trials} trials, the first for ' if job.num_trials else ''
  print(f'The job trains {trials or "for "}{training_length(configs[0])}.')
  print(f'Read the files, then run these commands in {ROOT}:')
  width = min(max(len(command) for command, _ in launch.commands), 72)
  for command, what in launch.commands:
    print(f'  {command:<{width}}  # {what}')
  for command, _ in launch.commands[: launch.num_to_start] if flags.run else ():
    print(f'+ {command}', flush=True)
    code = subprocess.run(
      ['bash', '-c', command], cwd=ROOT, check=False
    ).returncode
    if code:
      return cli.report_errors([f'{command}: exit code {code}.'])
  return 0


if __name__ == '__main__':
  sys.exit(main())
