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
from typing import Any

from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import launch_arguments
import protocol

from bn_repro import cli, files, paper
from bn_repro import config as config_lib
from bn_repro.data import imagenet_metadata
from bn_repro.errors import UserError
from bn_repro.runtime import streams
from bn_repro.sweep import grid


@dataclasses.dataclass(frozen=True)
class Job:
  """What runs on every host, in the repository.

  Attributes:
    name: name of the launch.
    command: training command.
    workdir: workdir on the hosts, or a place in a bucket.
    data_dir: folder of the data set on the hosts; may be empty.
    files: files of the repository that the command names.
    num_trials: number of trials of a sweep, otherwise 0. With `--trial=NUMBER`
      appended, the command trains one of them.
  """

  name: str
  command: tuple[str, ...]
  workdir: str
  data_dir: str
  files: tuple[str, ...]
  num_trials: int


@dataclasses.dataclass(frozen=True)
class Launch:
  """How a job is run.

  Attributes:
    files: content of each file, by name.
    tools: programs that the commands call.
    start: pairs of a command and what it does: those that start the training.
    then: further such pairs; the last one undoes what was started.
  """

  files: Mapping[str, str]
  tools: Sequence[str]
  start: Sequence[tuple[str, str]]
  then: Sequence[tuple[str, str]]


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
  name = flags.name
  if not re.fullmatch('[a-z]([-a-z0-9]{0,48}[a-z0-9])?', name):
    raise UserError(
      f'--name={name}: use at most 50 lower-case letters, digits and hyphens, '
      'starting with a letter and not ending with a hyphen.'
    )
  workdir = _workdir(flags)
  configs = _load_configs(flags, axes, overrides)
  data_dir = configs[0].data.data_dir
  if data_dir and not data_dir.startswith('/'):
    raise UserError(
      f'--config.data.data_dir={data_dir}: use an absolute path on the hosts, '
      'such as /mnt/data.'
    )
  specs = {
    flag: _in_repository(flag, spec, folder)
    for flag, spec, folder in (
      ('--sweep', flags.sweep, config_lib.CONFIGS / 'sweeps'),
      ('--config', flags.config, config_lib.CONFIGS),
    )
    if spec
  }
  command = (
    *('python', '-m', f'bn_repro.{"sweep" if flags.sweep else "main"}'),
    *(f'{flag}={spec}' for flag, spec in specs.items()),
    f'--workdir={workdir}',
    *(f'--sweep.{axis}' for axis in axes),
    *(f'--config.{override}' for override in overrides),
  )
  named = tuple(config_lib.split_mode(spec)[0] for spec in specs.values())
  num_trials = len(configs) if flags.sweep else 0
  return Job(name, command, workdir, data_dir, named, num_trials), configs


def _workdir(flags: argparse.Namespace) -> str:
  """Returns the workdir on the hosts.

  Raises:
    UserError: if it is no path that hosts can use, nor a place in a bucket; if
      the job cannot use a bucket.
  """
  text = flags.workdir
  if not text.startswith('gs:'):
    files.check_path('--workdir', text)
    # The folder above the workdir, on which a share is mounted, must not be /.
    if not re.match('/[^/]+/+[^/]', text):
      raise UserError(
        f'--workdir={text}: use an absolute path on the hosts, in a folder, '
        f'such as /mnt/runs/{flags.name}.'
      )
    return text
  place = files.parse_place('--workdir', text)
  if flags.place == 'slurm':
    raise UserError(
      f'--workdir={text}: jobs of SLURM do not use buckets. Name a folder that '
      f'all nodes share, such as /shared/runs/{flags.name}.'
    )
  if flags.workdir_mount or flags.shared_workdir:
    flag = '--workdir_mount' if flags.workdir_mount else '--shared_workdir'
    raise UserError(f'{flag}: a workdir in a bucket needs no mount. Omit it.')
  return str(place)


def _is_shared(job: Job, flags: argparse.Namespace) -> bool:
  """Whether all hosts see the workdir, and it outlives a slice."""
  in_bucket = job.workdir.startswith(files.BUCKET)
  return bool(in_bucket or flags.workdir_mount or flags.shared_workdir)


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
  """Returns a `spec` with the path of its file, relative to the repository.

  Args:
    flag: argument that has the value `spec`.
    spec: path of the file, or its name in `folder`, with an optional `:mode`.
    folder: folder of the shipped files.

  Raises:
    UserError: if the file is outside the repository.
  """
  name, mode = config_lib.split_mode(spec)
  path = config_lib.find_file(flag, name, folder).resolve()
  if not path.is_relative_to(ROOT):
    raise UserError(
      f'{flag}={name}: is outside the repository, and the hosts get only the '
      'repository. Move it into configs/.'
    )
  return f'{path.relative_to(ROOT)}{mode and ":"}{mode}'


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
  from bn_repro.data import datasets  # NumPy takes a moment.

  problems = []
  if not job.data_dir and (
    flags.data or not datasets.find(config.data.name).installed
  ):
    problems.append(
      '--config.data.data_dir: must name the folder of the data on the hosts, '
      'such as /mnt/data.'
    )
  hosts, spot = flags.topology.num_hosts, flags.place == 'sky' or flags.spot
  if (hosts > 1 or spot) and not _is_shared(job, flags):
    why = (
      f'{hosts} hosts must share it'
      if hosts > 1
      else 'it must outlive a preempted spot slice'
    )
    problems.append(
      f'--workdir={job.workdir}: {why}. Use gs://BUCKET/NAME; or give '
      '--workdir_mount=SERVER:/SHARE, or --shared_workdir if you mount the '
      'share yourself.'
    )
  if problems:
    raise UserError(*problems)


def _fill(template: str, render: Callable[[str], str]) -> str:
  """Returns a file of `scripts/launch/` with its `@marks@` filled in."""
  text = (ROOT / 'scripts' / 'launch' / template).read_text()
  return re.sub(r'@(\w+)@', lambda match: render(match[1]), text)


def _script(template: str, values: Mapping[str, Any]) -> str:
  """Returns a shell script; a sequence becomes the items of an array."""

  def render(mark: str) -> str:
    value = values[mark]
    if isinstance(value, list | tuple):
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
  shared = _is_shared(job, flags)
  values = {
    **_slice_values(job, flags),
    'source': 'git' if flags.source else 'local',
    'spot': 'yes' if flags.spot else 'no',
    'shared': 'yes' if shared else 'no',
  }
  keep = 'keep --delete' if shared else 'keep'
  script = f'bash {_quote(folder)}/slice.sh'
  return Launch(
    files={name: _script(name, values) for name in ('slice.sh', 'host.sh')},
    tools=('gcloud',),
    start=(
      (f'{script} create', 'requests the slice and waits for it'),
      (f'{script} set_up', 'copies, mounts and installs on all hosts'),
      (f'{script} train', 'starts the training loop on all hosts'),
    ),
    then=(
      (f'{script} {keep}', 'watches the slice until the run has ended'),
      (f'{script} state', 'prints the state of the slice and its hosts'),
      (f'{script} logs', 'follows the log of host 0'),
      (f'{script} stop', 'saves and stops'),
      (f'{script} delete', 'deletes the slice, which is billed until then'),
    ),
  )


def sky(job: Job, flags: argparse.Namespace, folder: str) -> Launch:
  """Launches a job, or each trial of a sweep, as a managed job of SkyPilot."""
  each, name, number = '{}', job.name, ''
  if job.num_trials:
    last = job.num_trials - 1
    each = f'(for trial in $(seq 0 {last}); do {{}} || exit; done)'
    name = f'{job.name}-$trial'
    number = f'--name {name} --env TRIAL=$trial '
  code = f'{folder}/source'
  pack = shlex.join(['bash', 'scripts/launch/pack.sh', code, *job.files])
  launch = f'sky jobs launch --yes --detach-run {number}{_quote(folder)}'
  first = name.replace('$trial', '0')
  return Launch(
    files={'sky.yaml': _sky_task(job, flags, code)},
    tools=('sky', 'gcloud'),
    start=(
      *(() if flags.source else [(pack, 'copies the code, to send')]),
      (each.format(f'{launch}/sky.yaml'), 'starts it'),
    ),
    then=(
      ('sky jobs queue', 'prints its state'),
      (f'sky jobs logs --name {first}', 'follows its log'),
      *_comparison(job),
      (each.format(f'sky jobs cancel --yes --name {name}'), 'cancels it'),
    ),
  )


def _sky_task(job: Job, flags: argparse.Namespace, code: str) -> str:
  values = _slice_values(job, flags)
  mount = {job.data_dir: {'source': flags.data, 'mode': 'MOUNT'}}
  values |= {
    'accelerators': f'tpu-{values["accelerator_type"]}',
    'file_mounts': mount if flags.data else {},
    'source': {'url': values['url'], 'ref': values['revision']}
    if flags.source
    else code,
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
  # SLURM replaces %A by the number of an array and %a by that of its job.
  log = '%A_%a' if job.num_trials else '%j'
  values = {
    **vars(flags),
    **vars(job),
    'tasks_per_node': tasks,
    'cpus_per_task': flags.cpus_per_gpu * flags.gpus // tasks,
    'output': f'{folder.replace("%", "%%")}/{log}.log',
  }
  array = [f'--array=0-{job.num_trials - 1}'] if job.num_trials else []
  submit = shlex.join(['sbatch', *array, *flags.sbatch, f'{folder}/job.sh'])
  return Launch(
    files={'job.sh': _script('job.sh', values)},
    tools=('sbatch',),
    start=((submit, 'submits the job'),),
    then=(
      (f'squeue --name={job.name}', 'prints its state'),
      (f'tail -F {_quote(folder)}/*.log', 'follows its log'),
      *_comparison(job),
      (f'scancel --name={job.name}', 'cancels it'),
    ),
  )


def _comparison(job: Job) -> list[tuple[str, str]]:
  """Returns the command that compares trials run by separate jobs."""
  if not job.num_trials:
    return []
  command = shlex.join([*job.command, '--compare'])
  in_bucket = job.workdir.startswith(files.BUCKET)
  where = 'anywhere' if in_bucket else 'where the workdir is'
  return [(command, f'compares the trials; run it {where}')]


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
  return PLACES[flags.place](job, flags, folder)


PLACES: Mapping[str, Callable[[Job, argparse.Namespace, str], Launch]] = {
  'tpu-vm': tpu_vm,
  'sky': sky,
  'slurm': slurm,
}


def _num_examples(config: ConfigDict) -> int | None:
  """Returns the number of training images; None if only loading tells it."""
  if config.data.name != imagenet_metadata.NAME:
    return None
  return imagenet_metadata.NUM_EXAMPLES['train'] - config.data.holdout


def training_length(config: ConfigDict) -> str:
  """Returns the steps, images and epochs of a run, as far as known."""
  if not config.total_steps:
    return f'{config.total_epochs:g} epochs'
  return cli.describe_length(
    config.total_steps, config.batch_size, _num_examples(config)
  )


def gpu_hours(configs: Sequence[ConfigDict], num_gpus: int) -> str:
  """Returns a sentence on the GPU-hours of all runs together."""
  images = 0.0
  for config in configs:
    examples = _num_examples(config)
    # The estimate is that of the paper's networks.
    if not examples or config.model.width != 1 or config.data.image_size != 224:
      return (
        'GPU-hours: no estimate for this network or data set; python '
        'scripts/benchmark.py step measures the time of a step.'
      )
    steps = config.total_steps * config.batch_size
    images += steps or config.total_epochs * examples
  low, high = (
    f'{hours:,.0f}' if hours >= 10 else f'{hours:.2g}'
    for hours in protocol.gpu_hours(images)
  )
  share = min(config.batch_size for config in configs) / num_gpus
  sentence = (
    f'GPU-hours: {low} to {high} in total, with {share:g} images per '
    'GPU and step (estimated for an A100, not measured).'
  )
  if share < paper.BATCH_SIZE:
    sentence += f' Fewer than {paper.BATCH_SIZE} take longer per image.'
  return sentence


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


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  try:
    flags, axes, overrides = cli.parse_sweep_arguments(
      sys.argv[1:] if argv is None else argv, launch_arguments.create_parser()
    )
    out = flags.out or ROOT / 'launch' / flags.name
    inside = out.is_relative_to(ROOT)
    folder = str(out.relative_to(ROOT) if inside else out)
    job, configs = create_job(flags, axes, overrides)
    launch = create_launch(job, configs, flags, folder)
    if flags.run:
      check_tools(launch.tools)
    write(launch.files, out)
  except UserError as error:
    return cli.report_user_error(error)
  except OSError as error:
    return cli.report_errors([str(error)])
  print(f'wrote {", ".join(f"{folder}/{name}" for name in launch.files)}')
  trials = f'{job.num_trials} trials, the first for ' if job.num_trials else ''
  print(f'The job trains {trials or "for "}{training_length(configs[0])}.')
  if flags.place == 'slurm':
    print(gpu_hours(configs, flags.nodes * flags.gpus))
  print(f'Read the files, then run these commands in {ROOT}:')
  commands = (*launch.start, *launch.then)
  width = min(max(len(command) for command, _ in commands), 72)
  for command, what in commands:
    print(f'  {command:<{width}}  # {what}')
  streams.make_output_optional()
  for command, _ in launch.start if flags.run else ():
    print(f'+ {command}', flush=True)
    code = subprocess.run(
      ['bash', '-c', command], cwd=ROOT, check=False
    ).returncode
    if code:
      undo, _ = launch.then[-1]
      return cli.report_errors(
        [f'{command}: exit code {code}. To undo what was started: {undo}']
      )
  return 0


if __name__ == '__main__':
  sys.exit(cli.run(main))
