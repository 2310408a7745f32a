"""Writes what it takes to train on rented hardware, and runs it if asked.

What is written is meant to be read: the files of `scripts/launch/` with their
settings filled in. What runs is a `Job`; a function for each place wraps it in
a `Launch`. Mistakes are found before anything is written, and without JAX.
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
from typing import Any

from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bn_repro import cli
from bn_repro import config as config_lib
from bn_repro.data import imagenet_metadata
from bn_repro.errors import UserError
from bn_repro.sweep import grid
from bn_repro.tpu import slices

_DESCRIPTION = """\
Write the scripts that train a config, or a sweep, on rented hardware, for you
to read and run; --run runs those that start the training.
"""

# What docs/imagenet.md trains BN-x30 with, on 16 chips.
_PROTOCOL = """\
    --config.batch_size=512 --config.total_steps=375000 \\
    --config.eval_every=6250 --config.checkpoint_every=1250 \\
    --config.log_every=125 --config.bn.statistics=group \\
    --config.bn.momentum=0.9952 --config.data.num_workers=14 \\
    --config.data.num_threads=8
"""
_EXAMPLES = {
  'tpu-vm': f"""
  python scripts/launch.py tpu-vm --name=bn-x30 --topology=v5e:4x4 --spot \\
    --project=PROJECT --zone=us-west4-a --workdir_mount=10.0.0.2:/runs \\
    --data_disk=imagenet --config=configs/bn_x30.py \\
    --workdir=/mnt/runs/bn_x30 --config.data.data_dir=/mnt/data \\
{_PROTOCOL}""",
  'sky': f"""
  python scripts/launch.py sky --name=bn-x30 --topology=v5e:4x4 \\
    --workdir_mount=10.0.0.2:/runs --data_bucket=gs://BUCKET \\
    --config=configs/bn_x30.py \\
    --workdir=/mnt/runs/bn_x30 --config.data.data_dir=/mnt/data \\
{_PROTOCOL}""",
  'slurm': f"""
  python scripts/launch.py slurm --name=bn-x30 --nodes=2 --gpus=8 \\
    --cpus_per_gpu=14 --sbatch=--partition=gpu --config=configs/bn_x30.py \\
    --workdir=/shared/runs/bn_x30 --config.data.data_dir=/shared/data \\
{_PROTOCOL}""",
}

_NOTES = """
The training command is run again when it exits with 75 (stopped and saved) or
was killed, and not after 0 (done), 1 (failed) or 3 (diverged): see
scripts/train_loop.sh. Several hosts write into one workdir, which all of them
have to see: on TPUs an NFS share such as Filestore, which --workdir_mount
mounts on the folder above it.

With --sweep=configs/sweeps/NAME.py:full in the place of --config it is a sweep:
an array of SLURM, a managed job a trial with SkyPilot, or one trial after
another on a TPU VM of one host.
"""


@dataclasses.dataclass(frozen=True)
class Job:
  """What to run, on every host and in the repository."""

  name: str
  command: tuple[str, ...]
  workdir: str
  data_dir: str  # Empty where nobody says.
  num_trials: int = 0  # Of a sweep: `--trial=NUMBER` after the command is one.


@dataclasses.dataclass(frozen=True)
class Launch:
  """How to run it: files, and commands, of which the first few start it."""

  files: Mapping[str, str]  # Name to content.
  tools: Sequence[str]  # What has to be installed here.
  commands: Sequence[tuple[str, str]]  # In this order, and what each does.
  num_to_start: int


def create_job(
  flags: argparse.Namespace, axes: Sequence[str], overrides: Sequence[str]
) -> tuple[Job, list[ConfigDict]]:
  """What is to run, and the configs that it trains.

  Args:
    flags: of the command.
    axes: assignments to axes of a sweep, if it is one.
    overrides: assignments to fields of the config.

  Raises:
    UserError: with what is wrong with them.
  """
  name, workdir = flags.name, flags.workdir
  if not re.fullmatch('[a-z]([-a-z0-9]{0,48}[a-z0-9])?', name):
    raise UserError(
      f'--name={name}: give at most 50 lower-case letters, digits and hyphens, '
      'a letter first and no hyphen last.'
    )
  # With a folder above it, for something to be mounted on.
  if not re.match('/[^/]+/+[^/]', workdir):
    raise UserError(
      f'--workdir={workdir}: give an absolute path on the hosts, such as '
      f'/mnt/runs/{name}.'
    )
  if flags.sweep:
    sweep = grid.load(flags.sweep, axes, flags.config or '', overrides)
    configs = [trial.config for trial in sweep.trials]
    command = (
      *('python', '-m', 'bn_repro.sweep'),
      _in_repository('--sweep', flags.sweep, config_lib.CONFIGS / 'sweeps'),
      f'--workdir={workdir}',
      *([_in_repository('--config', flags.config)] if flags.config else []),
      *(f'--sweep.{axis}' for axis in axes),
      *(f'--config.{override}' for override in overrides),
    )
  elif flags.config:
    configs = [config_lib.load(flags.config, overrides)]
    command = (
      *('python', '-m', 'bn_repro.main'),
      _in_repository('--config', flags.config),
      f'--workdir={workdir}',
      *(f'--config.{override}' for override in overrides),
    )
  else:
    raise UserError('--config or --sweep: say what to train.')
  data_dir = configs[0].data.data_dir
  if data_dir and not data_dir.startswith('/'):
    raise UserError(
      f'--config.data.data_dir={data_dir}: give an absolute path on the hosts.'
    )
  num_trials = len(configs) if flags.sweep else 0
  return Job(name, command, workdir, data_dir, num_trials), configs


def _in_repository(
  flag: str, spec: str, folder: Path = config_lib.CONFIGS
) -> str:
  """An argument that names a file, as it is in the hosts' repository.

  Raises:
    UserError: if it is not in this one.
  """
  name, colon, mode = spec.partition(':')
  path = config_lib.find_file(flag, name, folder).resolve()
  if not path.is_relative_to(ROOT):
    raise UserError(
      f'{flag}={name}: lies outside of the repository, which is what the '
      'hosts get. Put it into configs/.'
    )
  return f'{flag}={path.relative_to(ROOT)}{colon}{mode}'


def check_fits(configs: Sequence[ConfigDict], num_devices: int) -> None:
  """Sees that configs can be trained on so many devices.

  Raises:
    UserError: if one cannot.
  """
  problems = []
  for config in configs:
    if config.model.dtype == 'float64':
      problems.append(
        'config.model.dtype=float64: is for comparing numbers on CPUs; TPUs '
        'have none, and GPUs are slow at it. Use auto.'
      )
    try:
      config_lib.check_divides(config, num_devices)
    except UserError as error:
      problems += error.problems
  if problems:
    raise UserError(*dict.fromkeys(problems))


def _fill(template: str, render: Callable[[str], str]) -> str:
  """A file of `scripts/launch/` with each of its `@marks@` filled in."""
  text = (ROOT / 'scripts' / 'launch' / template).read_text()
  return re.sub(r'@(\w+)@', lambda match: render(match[1]), text)


def _script(template: str, values: Mapping[str, Any]) -> str:
  """A shell script; tuples become the items of arrays, a line each."""

  def render(mark: str) -> str:
    value = values[mark]
    if isinstance(value, tuple):
      return ''.join(f'\n  {_quote(item)}' for item in value) + '\n'
    return _quote(value)

  return _fill(template, render)


def _quote(value: Any) -> str:
  return shlex.quote(str(value))


def _of_slice(job: Job, flags: argparse.Namespace) -> dict[str, Any]:
  """What both ways to a TPU fill in."""
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
  """Wraps a job for Cloud TPU VMs, asked for as a queued resource.

  A sweep's trials are trained there one after another.

  Raises:
    UserError: for a sweep on several hosts.
  """
  hosts = flags.topology.num_hosts
  if job.num_trials:
    if hosts > 1:
      raise UserError(
        f'--topology={flags.topology}: has {hosts} hosts, and a sweep runs on '
        'one. Take a slice of one host, or sky, where each trial has a slice.'
      )
    job = dataclasses.replace(job, command=(*job.command, '--jobs=1'))
  values = {
    **_of_slice(job, flags),
    'source': 'git' if flags.source else 'local',
    'spot': 'yes' if flags.spot else 'no',
  }
  script = f'bash {_quote(folder)}/slice.sh'
  return Launch(
    files={name: _script(name, values) for name in ('slice.sh', 'host.sh')},
    tools=('gcloud',),
    commands=(
      (f'{script} create', 'asks for the slice and waits for it'),
      (f'{script} set_up', 'copies, mounts and installs on all hosts'),
      (f'{script} train', 'starts the training loop on all hosts'),
      (f'{script} keep', 'watches, and makes a preempted slice anew'),
      (f'{script} state', 'says how the slice and its hosts stand'),
      (f'{script} logs', 'follows host 0'),
      (f'{script} stop', 'saves and stops'),
      (f'{script} delete', 'gives the slice back, which costs until then'),
    ),
    num_to_start=3,
  )


def sky(job: Job, flags: argparse.Namespace, folder: str) -> Launch:
  """Wraps a job for SkyPilot: a managed job on a spot slice."""
  values = _of_slice(job, flags)
  mount = {job.data_dir: {'source': flags.data, 'mode': 'MOUNT'}}
  values |= {
    'accelerators': f'tpu-{values["accelerator_type"]}',
    'file_mounts': mount if flags.data else {},
    'source': {'url': values['url'], 'ref': values['revision']}
    if flags.source
    else '.',
  }
  # YAML takes off the two spaces by which a block is indented.
  command = ' \\\n    '.join(
    _quote(item).replace('\n', '\n  ') for item in job.command
  )

  def render(mark: str) -> str:
    # JSON is YAML.
    return command if mark == 'command' else json.dumps(values[mark])

  path = f'{_quote(folder)}/sky.yaml'
  each, name, number = '{}', job.name, ''
  if job.num_trials:
    # A managed job for each trial.
    last = job.num_trials - 1
    each = f'(for trial in $(seq 0 {last}); do {{}} || exit; done)'
    name = f'{job.name}-$trial'
    number = f'--name {name} --env TRIAL=$trial '
  # A copy comes without its history.
  revision = (
    ''
    if flags.source
    else '--env "REVISION=$(git describe --always --dirty --abbrev=40)" '
  )
  return Launch(
    files={'sky.yaml': _fill('sky.yaml', render)},
    tools=('sky', 'gcloud'),
    commands=(
      (
        each.format(
          f'sky jobs launch --yes --detach-run {number}{revision}{path}'
        ),
        'starts it',
      ),
      ('sky jobs queue', 'says how it stands'),
      (
        f'sky jobs logs --name {name.replace("$trial", "0")}',
        'follows it',
      ),
      (each.format(f'sky jobs cancel --yes --name {name}'), 'ends it'),
      *_comparing(job),
    ),
    num_to_start=1,
  )


def slurm(job: Job, flags: argparse.Namespace, folder: str) -> Launch:
  """Wraps a job for SLURM: a batch job on nodes with GPUs."""
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
      (submit, 'puts the job into the queue'),
      (f'squeue --name={job.name}', 'says how it stands'),
      (f'tail -F {_quote(folder)}/*.log', 'follows it'),
      (f'scancel --name={job.name}', 'ends it'),
      *_comparing(job),
    ),
    num_to_start=1,
  )


def _comparing(job: Job) -> list[tuple[str, str]]:
  """The command that compares what trials on several hosts have written."""
  if not job.num_trials:
    return []
  return [
    (shlex.join([*job.command, '--compare']), 'where the workdir is: compares')
  ]


def create_launch(
  job: Job,
  configs: Sequence[ConfigDict],
  flags: argparse.Namespace,
  folder: str,
) -> Launch:
  """What a command asks for.

  Raises:
    UserError: with what is wrong with it.
  """
  if flags.place == 'slurm':
    check_fits(configs, flags.nodes * flags.gpus)
    return slurm(job, flags, folder)
  check_fits(configs, flags.topology.num_chips)
  check_storage(job, configs[0], flags)
  return {'tpu-vm': tpu_vm, 'sky': sky}[flags.place](job, flags, folder)


def check_storage(
  job: Job, config: ConfigDict, flags: argparse.Namespace
) -> None:
  """Sees that the hosts of a slice will have the data, and keep the run.

  Raises:
    UserError: if not.
  """
  problems = []
  if not job.data_dir and (
    flags.data or config.data.name in imagenet_metadata.NAMES
  ):
    problems.append(
      '--config.data.data_dir: say where the data lie, or are to be mounted, '
      'on the hosts, such as /mnt/data.'
    )
  hosts, spot = flags.topology.num_hosts, flags.place == 'sky' or flags.spot
  if (hosts > 1 or spot) and not (flags.workdir_mount or flags.shared_workdir):
    why = f'{hosts} hosts share' if hosts > 1 else 'a spot slice must not lose'
    problems.append(
      f'--workdir={job.workdir}: which {why}. Give --workdir_mount='
      'SERVER:/SHARE, or --shared_workdir if you mount it yourself.'
    )
  if problems:
    raise UserError(*problems)


def duration(config: ConfigDict) -> str:
  """How much a config trains, in words; of other data nobody counts images."""
  if not config.total_steps:
    return f'{config.total_epochs:g} epochs'
  counted = config.data.name == imagenet_metadata.NAME
  return cli.describe_length(
    config.total_steps,
    config.batch_size,
    imagenet_metadata.NUM_EXAMPLES['train'] - config.data.holdout
    if counted
    else None,
  )


def check_tools(tools: Sequence[str]) -> None:
  """Sees that commands are here, and that the cloud may be asked.

  Raises:
    UserError: if not.
  """
  for tool in tools:
    if shutil.which(tool) is None:
      raise UserError(
        f'{tool}: not found. Install it, or leave --run off and run the '
        'commands where it is.'
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
      raise UserError(f'gcloud has no credentials ({reason}). Use gcloud init.')


def write(files: Mapping[str, str], out: Path) -> None:
  """Writes the files of a launch.

  Raises:
    UserError: if the folder holds another launch, or the code of one that has
      begun, which a slice made anew is to get again.
  """
  for name in ('slice.sh', 'host.sh', 'sky.yaml', 'job.sh'):
    path = out / name
    if path.exists() and path.read_bytes() != files.get(name, '').encode():
      raise UserError(
        f'--out={out}: its {name} is of another launch. Delete it, or name '
        'another folder.'
      )
  if (out / 'source.tgz').exists():
    raise UserError(
      f'--out={out}: its source.tgz is what the hosts of a launch got. Go on '
      'with its scripts, or delete it.'
    )
  out.mkdir(parents=True, exist_ok=True)
  for name, text in files.items():
    (out / name).write_text(text)


def _not_empty(text: str) -> str:
  if not text:
    raise argparse.ArgumentTypeError('must not be empty')
  return text


def _of_form(pattern: str, form: str) -> Callable[[str], str]:
  """The type of an argument that has to match a pattern."""

  def check(text: str) -> str:
    if text and not re.fullmatch(pattern, text):
      raise argparse.ArgumentTypeError(f"'{text}' is not {form}")
    return text

  return check


def _create_parser() -> argparse.ArgumentParser:
  options: dict[str, Any] = {
    'formatter_class': argparse.RawDescriptionHelpFormatter,
    'allow_abbrev': False,
  }
  parser = cli.Parser(
    description=_DESCRIPTION,
    epilog=f'examples:{"".join(_EXAMPLES.values())}{_NOTES}',
    **options,
  )
  places = parser.add_subparsers(dest='place', required=True, metavar='PLACE')
  adders = {}
  for place, what in (
    ('tpu-vm', 'a slice of Cloud TPU VMs, by gcloud'),
    ('sky', 'a spot slice, which SkyPilot makes anew when it is preempted'),
    ('slurm', 'nodes with GPUs, by a batch job of SLURM'),
  ):
    one = places.add_parser(
      place,
      help=what,
      description=f'Train on {what}.',
      epilog=f'example:{_EXAMPLES[place]}{_NOTES}',
      **options,
    )
    adders[place] = add = one.add_argument
    add('--name', required=True, help='of this launch')
    cli.add_config_arguments(one, required=False)
    cli.add_sweep_arguments(one, required=False)
    add(
      '--workdir', required=True, metavar='DIR', help='absolute, on the hosts'
    )
    add('--out', metavar='DIR', help='where to write; launch/NAME by default')
    add('--run', action='store_true', help='also run what starts the training')
  for place in ('tpu-vm', 'sky'):
    add = adders[place]
    add(
      '--topology',
      required=True,
      type=slices.parse_slice,
      help='such as v5e:4x4',
    )
    add(
      '--source',
      default='',
      type=_of_form('[^#]+#[^#]+', 'URL#REVISION'),
      metavar='URL#REVISION',
      help='of a git repository for the hosts; by default a copy of this one',
    )
    add(
      '--workdir_mount',
      default='',
      type=_of_form('[^:]+:/.*', 'SERVER:/SHARE'),
      metavar='SERVER:/SHARE',
      help='NFS share to mount on the folder above the workdir',
    )
    add(
      '--shared_workdir',
      action='store_true',
      help='the workdir lies where you mount what outlives the hosts',
    )
  add = adders['tpu-vm']
  add('--project', required=True, type=_not_empty)
  add('--zone', required=True, type=_not_empty)
  add('--spot', action='store_true', help='cheaper, and preempted at any time')
  add(
    '--data_disk',
    dest='data',
    default='',
    metavar='DISK',
    help='disk to mount read-only on config.data.data_dir',
  )
  add = adders['sky']
  add('--infra', default='gcp', help='gcp (the default), or gcp/REGION/ZONE')
  add(
    '--data_bucket',
    dest='data',
    default='',
    type=_of_form('gs://.+', 'gs://BUCKET'),
    metavar='gs://BUCKET',
    help='bucket to mount on config.data.data_dir',
  )
  add = adders['slurm']
  add('--nodes', type=cli.positive, default=1, help='1 by default')
  add(
    '--gpus',
    type=cli.positive,
    default=1,
    help='of a node; 1 by default',
  )
  add(
    '--tasks',
    choices=('node', 'gpu'),
    default='node',
    help='a process for each',
  )
  add('--cpus_per_gpu', type=cli.positive, default=8, help='8 by default')
  add(
    '--sbatch',
    action='append',
    default=[],
    metavar='OPTION',
    help='a further option, such as --sbatch=--time=12:00:00',
  )
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
  trials = f'{job.num_trials} trials, the first ' if job.num_trials else ''
  print(f'They train {trials}{duration(configs[0])}.')
  print(f'Read them; then, in {ROOT}:')
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
