"""Tests of launching without a cloud, with stand-ins for its programs.

The files that the examples of `--help` write are in `tests/scripts/launch/`;
`PYTHONPATH=.:scripts:tests python tests/scripts/launch_test.py` updates them.
"""

import json
import os
from pathlib import Path
import re
import resource
import shlex
import shutil
import signal
import sys

import jsonschema
import launch
import launch_arguments
import pytest
from stand_ins import (
  ENDS,
  ROOT,
  SAVED,
  SAVES,
  TIMEOUT,
  arguments_of_runs,
  finish,
  lines,
  run,
  set_ends,
  stand_in,
  started,
  wait_until,
)
import yaml

GOLDEN = Path(__file__).with_name('launch')
PLACES = ('tpu-vm', 'sky', 'slurm')
# An override that does not survive careless quoting.
AWKWARD = '/mnt/it\'s "a $HOME" \\ of; `x`,y'

DATA = '--config.data.data_dir=/mnt/data'
RUN = (
  *('--name=bn-x30', '--config=configs/bn_x30.py'),
  '--workdir=/mnt/runs/bn_x30',
)
SHARED = ('--topology=v5e:4x4', '--shared_workdir', DATA)
TPU_VM = ('tpu-vm', *RUN, *SHARED, '--project=P', '--zone=Z')
SKY = ('sky', *RUN, *SHARED)
SLURM = ('slurm', *RUN)
SOURCE = '--source=https://example.org/bn#v1'
TRAIN = ['-m', 'bn_repro.main', *RUN[1:]]


def without(prefix, arguments):
  return tuple(a for a in arguments if not a.startswith(prefix))


def in_bucket(arguments):
  """The same launch with a workdir in a bucket."""
  rest = (a for a in arguments if 'workdir' not in a)
  return (*rest, '--workdir=gs://bucket/run')


def write(out, arguments):
  """Launches; returns the written files by name."""
  assert launch.main([*arguments, f'--out={out}']) == 0
  return {
    path.name: path.read_text() for path in out.iterdir() if path.is_file()
  }


def refuse(arguments, capsys):
  """Launches in vain; returns the error."""
  assert launch.main(list(map(str, arguments))) == 1
  said = capsys.readouterr()
  assert said.out == '' and said.err.startswith('error: ')
  return said.err


SWEEP = (
  *('--name=lr', '--workdir=/mnt/runs/lr', '--sweep.seed=0,1,2'),
  '--sweep=configs/sweeps/lr_multipliers.py:full',
  '--config.bn.momentum=0.99',
)
TPU_VM_SWEEP, SKY_SWEEP, SLURM_SWEEP = (
  (*without('--config=', arguments), *SWEEP)
  for arguments in (TPU_VM, SKY, SLURM)
)
SWEEP_COMMAND = [
  *('-m', 'bn_repro.sweep', '--sweep=configs/sweeps/lr_multipliers.py:full'),
  *('--workdir=/mnt/runs/lr', '--sweep.seed=0,1,2'),
  '--config.bn.momentum=0.99',
]


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


# Written files.


@pytest.mark.parametrize('place', PLACES)
def test_golden(place, tmp_path):
  found = write(tmp_path / 'out', launch_arguments.examples()[place][2:])
  expected = {p.name: p.read_text() for p in (GOLDEN / place).iterdir()}
  assert {
    name: text.replace(str(tmp_path / 'out'), f'tests/scripts/launch/{place}')
    for name, text in found.items()
  } == expected


def test_shellcheck(tmp_path):
  """All scripts, including those written for awkward arguments."""
  awkward = (f'--config.data.data_dir={AWKWARD}', '--config.init_from=a  b')
  for number, arguments in enumerate((TPU_VM, SLURM)):
    write(tmp_path / f'it is {number}', [*arguments, *awkward])
  files = [
    file
    for folder in (ROOT / 'scripts', GOLDEN, tmp_path)
    for file in folder.rglob('*.sh')
  ]
  assert len(files) >= 14
  for file in files:
    run('bash', '-n', file, check=True)
  path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
  shellcheck = shutil.which('shellcheck', path=path)
  checked = run(shellcheck, '--shell=bash', '-x', *files)
  assert checked.returncode == 0, checked.stdout


TEXT = {'type': 'string'}


def fields(**properties):
  return {
    'type': 'object',
    'additionalProperties': False,
    'properties': properties,
  }


# The fields of SkyPilot's own schema that are used here.
SKY_SCHEMA = fields(
  name=TEXT,
  workdir={'anyOf': [TEXT, fields(url=TEXT, ref=TEXT) | {'required': ['url']}]},
  resources=fields(
    infra={'type': 'string', 'pattern': '^gcp(/[^/]+(/[^/]+)?)?$'},
    accelerators=TEXT,
    accelerator_args=fields(runtime_version=TEXT),
    use_spot={'type': 'boolean'},
    job_recovery=fields(
      recover_on_exit_codes={
        'type': 'array',
        'uniqueItems': True,
        'items': {'type': 'integer', 'minimum': 0, 'maximum': 255},
      }
    ),
  ),
  file_mounts={
    'type': 'object',
    'additionalProperties': fields(
      source={'type': 'string', 'pattern': '^gs://'},
      mode={'enum': ['MOUNT', 'COPY', 'MOUNT_CACHED']},
    ),
  },
  envs=fields() | {'patternProperties': {'^[a-zA-Z_][a-zA-Z0-9_]*$': TEXT}},
  setup=TEXT,
  run=TEXT,
) | {'required': ['resources', 'run']}


def sky_task(out, *arguments):
  task = yaml.safe_load(write(out, [*SKY, *arguments])['sky.yaml'])
  jsonschema.validate(task, SKY_SCHEMA)
  return task


@pytest.mark.parametrize(
  'topology, accelerators, runtime_version',
  [
    ('v4:2x2x2', 'tpu-v4-16', 'tpu-ubuntu2204-base'),
    ('v5e:4x4', 'tpu-v5litepod-16', 'v2-alpha-tpuv5-lite'),
    ('v5p:2x2x1', 'tpu-v5p-8', 'v2-alpha-tpuv5'),
    ('v6e:2x4', 'tpu-v6e-8', 'v2-alpha-tpuv6e'),
  ],
)
def test_sky_resources(topology, accelerators, runtime_version, tmp_path):
  task = sky_task(
    tmp_path / 'out', f'--topology={topology}', '--infra=gcp/us-west4'
  )
  assert task['resources'] == {
    'infra': 'gcp/us-west4',
    'accelerators': accelerators,
    'accelerator_args': {'runtime_version': runtime_version},
    'use_spot': True,
    'job_recovery': {'recover_on_exit_codes': [75]},
  }


def test_sky_source_and_data(tmp_path):
  task = sky_task(tmp_path / 'out', SOURCE, DATA, '--data_bucket=gs://images')
  assert task['workdir'] == {'url': 'https://example.org/bn', 'ref': 'v1'}
  assert task['file_mounts'] == {
    '/mnt/data': {'source': 'gs://images', 'mode': 'MOUNT'}
  }
  assert task['envs']['DATA_DIR'] == '/mnt/data'
  out = tmp_path / 'local'
  assert sky_task(out)['workdir'] == f'{out}/source'


def test_sky_with_a_workdir_in_a_bucket(tmp_path):
  """Nothing is mounted for it."""
  task = yaml.safe_load(write(tmp_path / 'out', in_bucket(SKY))['sky.yaml'])
  assert task['envs']['WORKDIR'] == 'gs://bucket/run'
  assert task['envs']['WORKDIR_MOUNT'] == ''
  assert task['file_mounts'] == {}
  assert '--workdir=gs://bucket/run' in task['run']


@pytest.mark.parametrize('arguments', [TPU_VM_SWEEP, SKY_SWEEP])
def test_a_sweep_in_a_bucket(arguments, tmp_path, capsys):
  """Only its trials, if each has a slice, are compared by another command."""
  one_host = (*in_bucket(arguments), '--topology=v5e:2x2')
  written = write(tmp_path / 'out', one_host)
  assert any('--workdir=gs://bucket/run' in text for text in written.values())
  said = capsys.readouterr().out
  assert ('compares the trials; run it anywhere' in said) == (
    'sky' in arguments
  )


STEPS = '6,000,000 steps of 32: 192,000,000 images'


@pytest.mark.parametrize(
  'arguments, expected',
  [
    ('', f'{STEPS}, 149.9 epochs'),
    (
      '--config.batch_size=512',
      '6,000,000 steps of 512: 3,072,000,000 images, 2,397.8 epochs',
    ),
    ('--config.data.name=imagenet_stand_in', STEPS),
    ('--config.total_steps=0 --config.total_epochs=2.5', '2.5 epochs'),
  ],
)
def test_training_length(arguments, expected, tmp_path, capsys):
  write(tmp_path / 'out', [*TPU_VM, *arguments.split()])
  assert f'\nThe job trains for {expected}.\n' in capsys.readouterr().out


# SLURM.


@pytest.fixture
def batch(tmp_path, bin_dir, notes, monkeypatch):
  """Writes a job and starts it in a repository of stand-ins."""
  repository = tmp_path / 'repository'
  (repository / 'scripts').mkdir(parents=True)
  shutil.copy('scripts/train_loop.sh', repository / 'scripts')
  stand_in(
    repository / '.venv/bin/python',
    '[ "$1" != -c ] || exec grep -q "${2#import }" "$NOTES/plugins"\n'
    'echo "${JAX_LOCAL_DEVICE_IDS-none}" >"$NOTES/devices"\n'
    f'[ -e "$NOTES/ends" ] || exec {sys.executable} -c "$SAVES"\n{ENDS}',
  )
  (notes / 'plugins').write_text('jax_cuda13_plugin\n')
  monkeypatch.setenv('SAVES', SAVES)
  monkeypatch.setenv('SLURM_JOB_ID', '17')
  stand_in(
    bin_dir / 'srun', 'echo "${@:1:3}" >"$NOTES/srun"; shift 3; exec "$@"\n'
  )
  stand_in(bin_dir / 'scontrol', 'echo "$@" >"$NOTES/scontrol"\n')

  def start(*more, arguments=SLURM):
    write(tmp_path / 'out', [*arguments, *more])
    return started('bash', tmp_path / 'out' / 'job.sh', cwd=repository)

  return start


@pytest.mark.parametrize('ends', [[0], [3], [134, 75, 1]])
@pytest.mark.parametrize('plugin', ['jax_cuda13_plugin', 'jax_cuda12_plugin'])
def test_batch_job_ends(plugin, ends, batch, notes):
  """With JAX for either CUDA that requirements-gpu.txt allows."""
  (notes / 'plugins').write_text(f'{plugin}\n')
  set_ends(notes, *ends)
  awkward = f'--config.data.data_dir={AWKWARD}'
  assert finish(batch(awkward))[0] == ends[-1]
  assert arguments_of_runs(notes) == [[*TRAIN, awkward]] * len(ends)
  assert not (notes / 'scontrol').exists()


def test_batch_job_without_jax_for_gpus(batch, notes):
  (notes / 'plugins').write_text('jax_rocm7_plugin\n')
  code, error = finish(batch())
  assert code == 1
  assert 'error: .venv has no JAX for GPUs' in error


def test_batch_job_is_requeued_at_its_time_limit(batch, notes):
  with batch() as process:
    assert process.stdout.readline() == 'ready\n'
    process.terminate()
    said, _ = process.communicate(timeout=TIMEOUT)
  assert said == SAVED
  assert process.returncode == 75
  assert (notes / 'scontrol').read_text() == 'requeue 17\n'


@pytest.mark.parametrize(
  'tasks, num_tasks, cpus, devices',
  [('node', 1, 16, '0,1,2,3'), ('gpu', 4, 4, 'none')],
)
def test_batch_job_tasks(
  tasks, num_tasks, cpus, devices, batch, notes, tmp_path
):
  set_ends(notes, 0)
  finish(batch('--gpus=4', '--cpus_per_gpu=4', f'--tasks={tasks}'))
  text = (tmp_path / 'out' / 'job.sh').read_text()
  directives = re.findall('^#SBATCH --(.*)', text, flags=re.MULTILINE)
  assert {
    'gpus-per-node=4',
    f'ntasks-per-node={num_tasks}',
    f'cpus-per-task={cpus}',
    'signal=B:TERM@300',
    'requeue',
    'open-mode=append',
  } < set(directives)
  assert lines(notes / 'devices') == [devices]
  assert lines(notes / 'srun') == [
    f'--gpu-bind=none --kill-on-bad-exit=0 --cpus-per-task={cpus}'
  ]


@pytest.mark.parametrize(
  'arguments, log', [(SLURM, '%j'), (SLURM_SWEEP, '%A_%a')]
)
def test_logs(arguments, log, tmp_path):
  """One for each job, also of an array; `%` in a path is no pattern."""
  out = tmp_path / '100%j'
  text = write(out, arguments)['job.sh']
  assert f'\n#SBATCH --output={tmp_path}/100%%j/{log}.log\n' in text


@pytest.mark.parametrize(
  'arguments, images, share',
  [
    ((*SLURM, '--gpus=8'), 6e6 * 32, 4),
    (launch_arguments.examples()['slurm'][2:], 375_000 * 512, 32),
    (
      (*SLURM, '--config.total_epochs=2', '--config.total_steps=0'),
      2 * 1281167,
      32,
    ),
    ((*SLURM_SWEEP, '--gpus=2'), 21 * (31e6 + 15e6) * 32, 16),
  ],
)
def test_gpu_hours(arguments, images, share, tmp_path, capsys):
  """Two to four times the time that an A100 takes to move 0.33 GB per image."""
  write(tmp_path / 'out', arguments)
  said = capsys.readouterr().out
  low, high = (
    factor * images * 10.60e9 / 32 / 2.039e12 / 3600 for factor in (2, 4)
  )
  found = re.search(
    r'^GPU-hours: ([\d,.]+) to ([\d,.]+) in total, with (\d+) images per GPU',
    said,
    re.M,
  )
  assert [float(n.replace(',', '')) for n in found.groups()] == pytest.approx(
    [low, high, share], rel=0.01, abs=0.5
  )
  assert ('Fewer than 32 take longer' in said) == (share < 32)


@pytest.mark.parametrize(
  'override',
  ['--config.model.width=0.5', '--config.data.name=imagenet_stand_in'],
)
def test_no_estimate_of_gpu_hours(override, tmp_path, capsys):
  write(tmp_path / 'out', [*SLURM, override])
  assert '\nGPU-hours: no estimate for this' in capsys.readouterr().out


def test_jax_takes_one_gpu_per_process_under_slurm(monkeypatch):
  """The batch job relies on this behavior of JAX."""
  from jax._src import clusters

  for setting in (
    *('JOB_ID=17', 'STEP_NODELIST=a[1-2]', 'NTASKS=4', 'PROCID=3', 'LOCALID=1'),
  ):
    name, value = setting.split('=')
    monkeypatch.setenv(f'SLURM_{name}', value)
  found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
    None, None, None, None, 'slurm', 10
  )
  assert found[1:] == (4, 3, [1])


# Sweeps.


def test_job_array_of_a_sweep(batch, notes, bin_dir, monkeypatch, capsys):
  """Each of its jobs trains one trial."""
  monkeypatch.setenv('SLURM_ARRAY_TASK_ID', '41')
  stand_in(bin_dir / 'sbatch', 'printf "%s\\n" "$@" >"$NOTES/submitted"')
  set_ends(notes, 3)
  assert finish(batch('--run', arguments=SLURM_SWEEP))[0] == 3
  assert arguments_of_runs(notes) == [[*SWEEP_COMMAND, '--trial=41']]
  assert lines(notes / 'submitted')[0] == '--array=0-41'
  said = capsys.readouterr().out
  assert 'trains 42 trials, the first for 31,000,000 steps of 32' in said
  assert shlex.join(['python', *SWEEP_COMMAND, '--compare']) in said


def test_managed_jobs_of_a_sweep(cloud, tmp_path, bin_dir):
  """One job per trial, each with its number; the code is packed once."""
  stand_in(bin_dir / 'sky', 'echo "$@" >>"$NOTES/submitted"')
  out = tmp_path / 'out'
  arguments = [*SKY_SWEEP, '--sweep.multiplier=1,5']
  task = yaml.safe_load(write(out, [*arguments, '--run'])['sky.yaml'])
  assert lines(cloud / 'submitted') == [
    f'jobs launch --yes --detach-run --name lr-{number} --env TRIAL={number} '
    f'{out}/sky.yaml'
    for number in range(12)
  ]
  assert (out / 'source/bn_repro/main.py').exists()
  for number, expected in (('7', ['--trial=7']), ('', [])):
    script = f'bash() {{ printf "%s\\n" "$@"; }}\n{task["run"]}'
    found = run('bash', '-c', script, check=True, TRIAL=number)
    program, *command = found.stdout.splitlines()
    assert program == 'scripts/train_loop.sh'
    assert sorted(command) == sorted(
      ['python', *SWEEP_COMMAND, '--sweep.multiplier=1,5', DATA, *expected]
    )


def test_a_sweep_on_a_tpu_vm(tmp_path):
  """One trial at a time."""
  arguments = [*TPU_VM_SWEEP, '--topology=v5e:2x4']
  text = write(tmp_path / 'out', arguments)['host.sh']
  assert 'bn_repro.sweep' in text and '--jobs=1' in text


# A cloud of two hosts, which are folders.

CLOUD = r"""
case "$*" in *' describe '*) ;; *) printf '%s\n' "$*" >>"$NOTES/calls" ;; esac
[ ! -e "$NOTES/fails" ] || [[ $* != *$(cat "$NOTES/fails")* ]] ||
  { echo 'ERROR: credentials were not found' >&2; exit 1; }
states=$NOTES/states
hosts=("$NOTES/host0" "$NOTES/host1")
for argument in "$@"; do
  case $argument in
    --worker=0) hosts=("$NOTES/host0") ;;
    --command=*) command=${argument#--command=} ;;
    *:*) target=${argument#*:} ;;
    */*.sh | */*.tgz) files+=("$argument") ;;
  esac
done
case "$*" in
  'auth print-access-token')
    [ -e "$NOTES/credentials" ] || { echo 'ERROR: no account' >&2; exit 1; } ;;
  *' queued-resources create '*)
    mkdir "${hosts[@]}"
    printf 'WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n' >"$states" ;;
  *' queued-resources describe '*)
    [ -e "$states" ] || { echo 'ERROR: NOT_FOUND: Resource' >&2; exit 1; }
    head -n 1 "$states"
    [ "$(wc -l <"$states")" -eq 1 ] || sed -i 1d "$states" ;;
  *' queued-resources delete '*)
    rm -rf "$states" "${hosts[@]}" ;;
  *' tpu-vm scp '*)
    for host in "${hosts[@]}"; do cp "${files[@]}" "$host/$target"; done ;;
  *' tpu-vm ssh '*)
    # No host of a preempted slice answers.
    [ "$(cat "$states" 2>&1)" != SUSPENDED ] || exit 255
    for host in "${hosts[@]}"; do
      (cd "$host" && HOME=$host bash -c "$command") || exit
    done ;;
esac
"""
# Creates environments without installing, and trains as `ends` says.
PYTHON = f"""
case "$1 $2" in
  '-m venv') mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  '-m pip') echo "$@" >>"$NOTES/pip" ;;
  '-m bn_repro.main') {{ flock 9; {ENDS} }} 9>"$NOTES/lock" ;;
esac
"""


@pytest.fixture
def cloud(bin_dir, notes, monkeypatch):
  """Stand-ins for the cloud, and for what its hosts install and mount."""
  (notes / 'credentials').touch()
  monkeypatch.setenv('INTERVAL', '0')
  for name, script in {
    'ssh-add': 'exit 2\n',  # No agent is running.
    'gcloud': CLOUD,
    'python3': PYTHON,
    'sudo': 'exec "$@"\n',
    'mount': 'echo "$@" >>"$NOTES/mounts"\n',
    'mount.nfs': '',
    'mountpoint': 'exit 1\n',
    'lsblk': 'echo "/dev/sda1 ext4 /"; echo "/dev/sdb ext4 "\n',
    # Every folder is on a file system of its own.
    'stat': 'echo "${*: -1}"\n',
  }.items():
    stand_in(bin_dir / name, script)
  return notes


@pytest.fixture
def hosts(cloud):
  """The launch's folders on two hosts of an active slice."""
  (cloud / 'states').write_text('ACTIVE\n')
  for name in ('host0', 'host1'):
    (cloud / name).mkdir()
  return [cloud / name / 'bn-x30' for name in ('host0', 'host1')]


def calls(notes):
  """The calls of gcloud except for polls, without project and zone."""
  text = re.sub(' --(project|zone)=[PZ]', '', (notes / 'calls').read_text())
  text = re.sub('^compute tpus ', '', text, flags=re.M)
  text = re.sub(
    'tpu-vm ssh bn-x30 --worker=(.*) --command=(.*)', r'\1: \2', text
  )
  return [
    line for line in text.splitlines() if not re.search('host.sh state', line)
  ]


def verb(out, *words, **options):
  return run('bash', out / 'slice.sh', *words, **options)


def test_from_nothing_to_deletion(cloud, tmp_path, capfd):
  """Packing, copying and the loops of two hosts, each preempted once."""
  out = tmp_path / 'out'
  set_ends(cloud, 75, 75, 0, 0)
  share, data = tmp_path / 'share', tmp_path / "the 'data'"
  run_arguments = [
    f'--workdir={share}/run',
    f'--config.data.data_dir={data}',
    f'--config.init_from={AWKWARD}',
  ]
  arguments = [
    *(a for a in TPU_VM if 'workdir' not in a and 'data' not in a),
    *(*run_arguments, '--spot', '--workdir_mount=10.0.0.2:/runs'),
    *('--data_disk=imagenet', f'--out={out}', '--run'),
  ]
  assert launch.main(arguments) == 0, capfd.readouterr().err
  wait_until(lambda: verb(out, 'state').stdout.count(': ended: ') == 2)
  said = verb(out, 'state').stdout
  assert said.startswith('bn-x30: ACTIVE\n')
  assert said.count('exit code 0: exiting') == 2
  assert verb(out, 'stop').returncode == 0
  assert verb(out, 'delete').returncode == 0
  assert verb(out, 'state').stdout == 'bn-x30: does not exist\n'
  assert calls(cloud) == [
    'auth print-access-token',
    'queued-resources create bn-x30 --node-id=bn-x30 '
    '--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite '
    '--spot '
    '--data-disk=source=projects/P/zones/Z/disks/imagenet,mode=read-only',
    'all: mkdir -p bn-x30',
    f'tpu-vm scp {out}/host.sh {out}/source.tgz bn-x30:bn-x30/ --worker=all',
    'all: bash bn-x30/host.sh set_up',
    'all: bash bn-x30/host.sh train',
    'all: bash bn-x30/host.sh stop',
    'queued-resources delete bn-x30 --force',
  ]
  assert arguments_of_runs(cloud) == [[*TRAIN[:3], *run_arguments]] * 4
  pip = (cloud / 'pip').read_text()
  assert pip.count('install') == 2 and '-r requirements-tpu.txt' in pip
  mounts = [
    f'-t nfs -o hard,sync,lookupcache=positive 10.0.0.2:/runs {share}',
    f'-o ro,noload /dev/sdb {data}',
  ]
  assert lines(cloud / 'mounts') == mounts * 2


def write_slice(tmp_path, *arguments):
  """Writes a launch whose hosts mount nothing; returns its folder."""
  out = tmp_path / 'out'
  text = write(out, [*TPU_VM, *arguments])['host.sh']
  text = text.replace('/mnt/runs', str(tmp_path / 'runs'))
  (out / 'host.sh').write_text(text.replace('/mnt/data', str(tmp_path)))
  return out


def test_a_preempted_slice_is_recreated(cloud, bin_dir, tmp_path):
  """And once more when its set-up fails."""
  out = write_slice(tmp_path, SOURCE, '--spot')
  (cloud / 'states').write_text('ACTIVE\nSUSPENDING\nSUSPENDED\n')
  set_ends(cloud, 0, 0)
  # The first clone fails, as on a host that is gone.
  stand_in(
    bin_dir / 'git',
    f"""
    echo "$@" >>"$NOTES/git"
    case "$1" in clone)
      [ -e "$NOTES/tried" ] || {{ touch "$NOTES/tried"; exit 1; }}
      mkdir -p "$4" && cp -r {ROOT}/scripts {ROOT}/requirements*.txt "$4" ;;
    esac
    """,
  )
  kept = verb(out, 'keep')
  assert kept.returncode == 0, kept.stderr
  set_up = [
    f'tpu-vm scp {out}/host.sh bn-x30:bn-x30/ --worker=all',
    'all: bash bn-x30/host.sh set_up',
  ]
  assert [call for call in calls(cloud) if 'mkdir' not in call] == [
    'queued-resources delete bn-x30 --force',
    'queued-resources create bn-x30 --node-id=bn-x30 '
    '--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite '
    '--spot',
    *(set_up * 2),
    'all: bash bn-x30/host.sh train',
  ]
  assert 'exit code 0: exiting' in kept.stderr
  assert '-C source checkout --quiet --detach v1' in (cloud / 'git').read_text()


# Trains for 60 steps as far as a workdir shows. Of several processes, the first
# writes.
TRAINS = """
import json, os, sys, time
from bn_repro import files
from bn_repro.runtime import mirror, workdir
(text,) = (a for a in sys.argv if a.startswith('--workdir='))
text = text.removeprefix('--workdir=')
path = files.expand('--workdir', text, in_bucket=True)
mirror.Mirror.__init__.__kwdefaults__.update(interval=0.1, expires=3.0)
run = workdir.Workdir(path, writes=os.environ['HOME'].endswith('host0'))
with open(os.environ['NOTES'] + '/processes', 'a') as processes:
  print(os.getpid(), os.getppid(), file=processes)
run.claim()
start = len(workdir.read_metrics(run.metrics))
if run.writes:
  run.write_status('running', start, '')
  for step in range(start, 60):
    line = {'step': step, 'split': 'train', 'start': start}
    with run.metrics.open('a') as lines:
      print(json.dumps(line), file=lines)
    run.check_claim()
    time.sleep(0.05)
  run.write_status('done', 60, '')
  run.release()
while run.status().get('status') != 'done':
  time.sleep(0.2)
  run.claim()
"""
# Creates environments without installing. Each host has a cache and processes
# of its own.
TRAINING = f"""
case "$1 $2" in
  '-m venv') mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  '-m pip') echo "$@" >>"$NOTES/pip" ;;
  '-m bn_repro.main')
    export XDG_CACHE_HOME=$HOME/cache TMPDIR=$HOME
    exec {sys.executable} -c "$TRAINS" "$@" ;;
  scripts/*) exec {sys.executable} "$@" ;;
esac
"""


@pytest.mark.slow
def test_the_life_of_a_spot_slice_with_a_bucket(
  cloud, bin_dir, bucket, tmp_path, monkeypatch, capfd
):
  """The second slice continues what the first one has left in the bucket."""
  stand_in(bin_dir / 'python3', TRAINING)
  stand_in(bin_dir / 'sleep', 'exec /bin/sleep 0.2\n')
  monkeypatch.setenv('TRAINS', TRAINS)
  out = tmp_path / 'out'
  arguments = (*in_bucket(without(DATA, TPU_VM)), *DIGITS, '--spot')
  launched = launch.main([*arguments, f'--out={out}', '--run'])
  assert launched == 0, capfd.readouterr().err
  with started('bash', out / 'slice.sh', 'keep', '--delete') as keeping:

    def saved():
      data = bucket.objects.get('run/metrics.jsonl', {'data': b''})['data']
      return [json.loads(line) for line in data.splitlines()]

    wait_until(lambda: len(saved()) >= 10)
    (cloud / 'states').write_text('SUSPENDED\n')
    for process in (cloud / 'processes').read_text().split()[::-1]:
      os.kill(int(process), signal.SIGKILL)
    left = len(saved())
    _, said = keeping.communicate(timeout=TIMEOUT)
  assert keeping.returncode == 0, said
  assert 'preempted, recreating the slice' in said
  assert said.endswith('exit code 0. The slice is deleted\n')
  assert not (cloud / 'states').exists() and not (cloud / 'host0').exists()
  requested = [call.split()[1] for call in calls(cloud) if 'queued' in call]
  assert requested == ['create', 'delete', 'create', 'delete']
  assert not (cloud / 'mounts').exists()
  assert 10 <= left < 60
  assert [line['step'] for line in saved()] == list(range(60))
  starts = [line['start'] for line in saved()]
  assert starts == [0] * starts[-1] + [starts[-1]] * (60 - starts[-1])
  assert starts[-1] >= 10
  status = json.loads(bucket.objects['run/status.json']['data'])
  assert status['status'] == 'done'
  assert 'run/lock' not in bucket.objects


def assert_gave_up(kept, out):
  """`keep` failed eight times, with longer and longer pauses."""
  assert kept.returncode == 1
  last = kept.stderr.splitlines()[-1]
  assert 'error: giving up after 8 failures' in last
  assert last.endswith(f'may still be billing. Delete it: bash {out} delete')


@pytest.mark.parametrize(
  'state, fails',
  [
    ('SUSPENDED', 'queued-resources create'),
    ('ACTIVE', 'tpu-vm scp'),
    ('ACTIVE', 'tpu-vm ssh'),
    ('ACTIVE', 'queued-resources describe'),
  ],
)
def test_keep_gives_up_after_failures(state, fails, cloud, hosts, tmp_path):
  out = write_slice(tmp_path, SOURCE, '--spot')
  (cloud / 'states').write_text(f'{state}\n')
  (cloud / 'fails').write_text(fails)
  kept = verb(out, 'keep', INTERVAL='30')
  assert_gave_up(kept, out / 'slice.sh')
  assert lines(cloud / 'pauses') == [str(30 * 2**n) for n in range(1, 8)]


def answering(hosts, out, answer):
  """Hosts that answer the same whenever they are asked, and obey."""
  script = f'[ "$1" != state ] || echo {shlex.quote(answer)}\n'
  (out / 'host.sh').write_text(script)
  for host in hosts:
    host.mkdir(exist_ok=True)
    (host / 'host.sh').write_text(script)


@pytest.mark.parametrize('answer', ['h: not running', '', 'h: Segmentation'])
def test_keep_gives_up_on_hosts_that_do_not_train(
  answer, cloud, hosts, tmp_path
):
  out = write_slice(tmp_path, SOURCE)
  answering(hosts, out, answer)
  assert_gave_up(verb(out, 'keep'), out / 'slice.sh')


@pytest.mark.parametrize('hangs', ['describe', 'state', 'mkdir'])
def test_keep_gives_up_on_calls_that_hang(hangs, cloud, hosts, tmp_path):
  """A poll and a set-up have a longest duration."""
  out = write_slice(tmp_path, SOURCE)
  answering(hosts, out, 'h: not running')
  stand_in(
    tmp_path / 'bin' / 'gcloud',
    f'case "$*" in *{hangs}*) exec tail -f /dev/null ;; esac\n{CLOUD}',
  )
  limits = {'LONGEST_POLL': '0.2', 'LONGEST_SET_UP': '0.2'}
  assert_gave_up(verb(out, 'keep', **limits), out / 'slice.sh')


def test_keep_gives_up_on_a_slice_that_does_not_exist(cloud, tmp_path):
  """It was deleted elsewhere; only a preempted one is recreated."""
  out = write_slice(tmp_path, SOURCE)
  assert_gave_up(verb(out, 'keep'), out / 'slice.sh')
  assert not (cloud / 'states').exists()


def test_create_gives_up_when_the_state_stays_unknown(cloud, tmp_path):
  out = write_slice(tmp_path, SOURCE)
  stand_in(
    tmp_path / 'bin' / 'gcloud',
    'case "$*" in *describe*)\n'
    '  [ -e "$NOTES/made" ] || { echo "ERROR: NOT_FOUND" >&2; exit 1; }\n'
    '  echo "ERROR: Reauthentication failed" >&2; exit 1 ;;\n'
    '*create*) touch "$NOTES/made" ;; esac\n',
  )
  assert_gave_up(verb(out, 'create'), out / 'slice.sh')


@pytest.mark.parametrize('word', ['keep', 'create', 'delete'])
def test_without_gcloud(word, tmp_path):
  out = write_slice(tmp_path, SOURCE)
  (tmp_path / 'bin').mkdir()
  for tool in ('bash', 'date', 'dirname'):
    (tmp_path / 'bin' / tool).symlink_to(shutil.which(tool))
  (line,) = verb(out, word, PATH=str(tmp_path / 'bin')).stderr.splitlines()
  assert 'error: gcloud: not found' in line
  assert line.endswith(f'Delete it: bash {out}/slice.sh delete')


@pytest.mark.parametrize('words', [['keep'], ['keep', '--delete']])
@pytest.mark.parametrize(
  'code, is_over',
  [(0, True), (1, True), (3, True), (127, True), (75, False), (143, False)],
)
def test_the_slice_of_a_run_that_ended(
  code, is_over, words, cloud, hosts, tmp_path
):
  """`keep --delete` deletes it, unless the run was stopped and has saved."""
  out = write_slice(tmp_path, SOURCE)
  answer = f'h: ended: train_loop: 1 exit code {code}: exiting'
  answering(hosts, out, answer)
  kept = verb(out, *words)
  assert kept.returncode == code
  is_deleted = is_over and '--delete' in words
  assert (cloud / 'states').exists() != is_deleted
  last = kept.stderr.splitlines()[-1]
  assert last.endswith(
    'The slice is deleted'
    if is_deleted
    else f'is still billing. Delete it: bash {out}/slice.sh delete'
  )


def test_a_slice_that_cannot_be_deleted(cloud, hosts, tmp_path):
  out = write_slice(tmp_path, SOURCE)
  answering(hosts, out, 'h: ended: train_loop: 1 exit code 0: exiting')
  (cloud / 'fails').write_text('queued-resources delete')
  assert_gave_up(verb(out, 'keep', '--delete'), out / 'slice.sh')


def test_a_workdir_on_the_slice_is_not_deleted(cloud, hosts, tmp_path, capsys):
  out = tmp_path / 'out'
  write(out, [*UNSHARED, '--topology=v5e:2x4'])
  assert 'slice.sh keep  ' in capsys.readouterr().out
  kept = verb(out, 'keep', '--delete')
  assert kept.returncode == 1
  assert 'error: --delete: the workdir is on the boot disk' in kept.stderr
  assert (cloud / 'states').exists()


@pytest.mark.parametrize(
  'words', ['', 'remove', 'keep delete', 'create --delete', 'delete now']
)
def test_other_words(words, cloud, hosts, tmp_path):
  out = write_slice(tmp_path)
  said = verb(out, *words.split())
  assert said.returncode == 1
  assert said.stderr.startswith('Creates a Cloud TPU slice')
  assert not (cloud / 'calls').exists()


def test_flags_of_gcloud(cloud, tmp_path):
  """Any of them, to create the slice and to connect to its hosts."""
  flags = (
    '--internal-ips',
    '--network=my net',
    '--labels=a=b,c=$d',
    "--tags=it's",
  )
  out = write_slice(
    tmp_path,
    SOURCE,
    *(f'--gcloud={flag}' for flag in flags),
    *('--gcloud_ssh=--internal-ip', '--gcloud_ssh=--ssh-flag=-o A=b'),
  )
  assert verb(out, 'create').returncode == 0
  answering([cloud / host / 'bn-x30' for host in ('host0', 'host1')], out, '')
  assert verb(out, 'state').returncode == 0
  created, asked = lines(cloud / 'calls')
  assert created.endswith(f' {" ".join(flags)}')
  assert asked.endswith(' --internal-ip --ssh-flag=-o A=b')


@pytest.fixture
def copied(tmp_path):
  """The files of this repository that hosts need."""
  folder = tmp_path / 'repository'
  for name in ('scripts', 'bn_repro', 'configs'):
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, folder / name, ignore=ignored)
  for name in ('requirements-tpu.txt', 'pyproject.toml'):
    (folder / name).touch()
  return folder


def git(folder, *arguments):
  identity = ('-c', 'user.name=N', '-c', 'user.email=e')
  return run('git', '-C', folder, *identity, *arguments, check=True).stdout


@pytest.fixture
def repository(copied):
  """The same as a git repository, with two more files."""
  for name in ('kept.txt', 'deleted.txt'):
    (copied / name).write_text('as committed\n')
  for command in ('init', 'add .', 'commit --message=m'):
    git(copied, *command.split())
  return copied


def test_code_of_a_slice(hosts, repository, tmp_path, capsys):
  """The hosts get the tracked files as they are at `set_up`."""
  out = write_slice(tmp_path)
  (repository / 'deleted.txt').unlink()
  (repository / 'new.txt').write_text('new\n')
  for now, words, expected in (
    ('first', ['set_up'], 'first'),
    ('second', ['set_up'], 'second'),
    ('third', ['set_up', 'again'], 'second'),
  ):
    (repository / 'kept.txt').write_text(now)
    done = verb(out, *words, cwd=repository)
    assert done.returncode == 0, done.stderr
    assert {(h / 'source/kept.txt').read_text() for h in hosts} == {expected}
  source = hosts[1] / 'source'
  assert not (source / 'new.txt').exists()
  assert not (source / 'deleted.txt').exists()
  head = git(repository, 'rev-parse', 'HEAD').strip()
  assert (source / 'REVISION').read_text() == f'{head}-dirty\n'
  # Another launch of this name does not reuse the code.
  for name in ('slice.sh', 'host.sh'):
    (out / name).unlink()
  capsys.readouterr()
  error = refuse([*TPU_VM, f'--out={out}'], capsys)
  assert 'its source.tgz is the code of a launch' in error


def pack(folder, *files, **environment):
  """Packs the code of a repository; returns its files and what was said."""
  code = folder.parent / 'code'
  done = run(
    *('bash', 'scripts/launch/pack.sh', code, *files),
    cwd=folder,
    **environment,
  )
  assert done.returncode == 0, done.stderr
  return {
    str(path.relative_to(code)) for path in code.rglob('*') if path.is_file()
  } - {'REVISION', '.skyignore'}, done.stderr


def test_untracked_files_are_not_sent(repository):
  """Data, runs and environments: only the named config, and added files."""
  tracked = set(git(repository, 'ls-files').splitlines())
  for name in (
    'data/train.tar',
    '.venv/bin/python',
    'a b/c\nd',
    'configs/x.py',
  ):
    path = repository / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(2_000_000))
  (repository / 'link').symlink_to('nowhere')
  git(repository, 'add', 'link')
  found, said = pack(repository, 'configs/x.py')
  assert found == {*tracked, 'configs/x.py'}
  assert (repository.parent / 'code/link').is_symlink()
  assert re.search(
    r'^code: \d+ files, [\d.]+M \(the files that git tracks', said
  )
  assert ', not 4 others: git add adds them)' in said


@pytest.mark.parametrize('repository_of', [None, '..', '.'])
def test_code_outside_a_git_checkout(repository_of, copied, monkeypatch):
  """A copy without history, also inside another repository."""
  monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(copied.parent.parent))
  if repository_of:
    git(copied / repository_of, 'init')
  (copied / 'data').mkdir()
  (copied / 'data/train.tar').write_bytes(bytes(2_000_000))
  (copied / 'REVISION').write_text('0123\n')
  found, said = pack(copied)
  assert 'bn_repro/main.py' in found and 'scripts/train_loop.sh' in found
  assert not any('train.tar' in name for name in found)
  assert 'no checkout of git: bn_repro, configs, scripts and the' in said
  assert (copied.parent / 'code/REVISION').read_text() == '0123\n'


def test_pack_replaces_only_what_it_has_written(repository):
  pack(repository)
  pack(repository)
  (repository / 'mine').mkdir()
  said = run('bash', 'scripts/launch/pack.sh', 'mine', cwd=repository)
  assert said.returncode == 1
  assert said.stderr.startswith('error: mine: exists, and is not a copy')


@pytest.mark.parametrize('verb', ['state', 'train', 'stop'])
def test_a_lock_that_fails_is_not_taken_for_training(verb, bin_dir, tmp_path):
  out = tmp_path / 'out'
  write(out, TPU_VM)
  (out / 'lock').touch()
  stand_in(bin_dir / 'flock', 'echo "flock: No locks available" >&2; exit 71')
  found = run('bash', out / 'host.sh', verb)
  assert found.returncode == 71
  assert found.stdout == ''
  assert found.stderr == 'flock: No locks available\n'


def test_a_restarted_host_trains_again(cloud, hosts, repository, tmp_path):
  """With the code of the other hosts; `keep` exits with the run's exit code."""
  out = write_slice(tmp_path)
  assert verb(out, 'set_up', cwd=repository).returncode == 0
  (repository / 'kept.txt').write_text('edited since\n')
  set_ends(cloud, 3)
  log, other_log = (host / 'train.log' for host in hosts)
  log.write_text('step 7\n')
  with (
    started(
      'flock', '--no-fork', hosts[0] / 'lock', 'tail', '-f', '/dev/null'
    ) as running,
    started('bash', out / 'slice.sh', 'keep', cwd=repository) as keeping,
  ):
    wait_until(
      lambda: other_log.exists() and ': exiting' in other_log.read_text()
    )
    # The other host is still training.
    assert keeping.poll() is None
    log.write_text('train_loop: 1 exit code 0: exiting\n')
    running.kill()
    keeping.communicate(timeout=TIMEOUT)
  assert keeping.returncode == 3
  assert len(arguments_of_runs(cloud)) == 1
  assert (hosts[1] / 'source/kept.txt').read_text() == 'as committed\n'


@pytest.mark.parametrize(
  'topology, held, fingerprint, code',
  [
    ('v5e:4x4', '2048 SHA256:other key (RSA)', 'SHA256:ours', 1),
    ('v5e:4x4', '2048 SHA256:other key (RSA)', '', 1),
    ('v5e:4x4', '2048 SHA256:ours key (RSA)', 'SHA256:ours', 0),
    ('v5e:4x4', '', 'SHA256:ours', 0),  # No agent, or an empty one.
    ('v5e:2x4', '2048 SHA256:other key (RSA)', 'SHA256:ours', 0),
  ],
)
def test_an_agent_without_the_key(
  topology, held, fingerprint, code, cloud, bin_dir, tmp_path
):
  """It is reported before the slice is requested."""
  stand_in(bin_dir / 'ssh-add', f'echo "{held}"; [ -n "{held}" ]\n')
  stand_in(
    bin_dir / 'ssh-keygen',
    f'[ -n "{fingerprint}" ] && echo "2048 {fingerprint} key (RSA)"\n',
  )
  write(tmp_path / 'out', [*TPU_VM, f'--topology={topology}'])
  asked = verb(tmp_path / 'out', 'create')
  assert asked.returncode == code
  assert ('error: the ssh-agent does not hold' in asked.stderr) == code
  assert (cloud / 'states').exists() != code


def on_host(folder, word):
  return run('bash', folder / 'host.sh', word, check=True).stdout


@pytest.mark.parametrize(
  'log, expected',
  [
    (None, 'not running'),
    ('train_loop: 1 running: a\nstep 7\n', 'not running'),  # The host was lost.
    (
      'train_loop: 1 exit code 3: exiting\n',
      'ended: train_loop: 1 exit code 3: exiting',
    ),
    (
      'train_loop: 1 exit code 75: exiting\ntrain_loop: 2 running: a\n',
      'not running',
    ),
  ],
)
def test_state_of_a_host_without_a_loop(log, expected, tmp_path):
  write(tmp_path, TPU_VM)
  if log:
    (tmp_path / 'train.log').write_text(log)
  assert on_host(tmp_path, 'state').endswith(f': {expected}\n')


def test_one_loop_per_host(tmp_path):
  """The loop outlives its start, starts only once, and saves when stopped."""
  write(tmp_path, TPU_VM)
  shutil.copytree(ROOT / 'scripts', tmp_path / 'source' / 'scripts')
  stand_in(
    tmp_path / 'source/.venv/bin/python',
    f'exec {sys.executable} -c {shlex.quote(SAVES)}',
  )
  assert on_host(tmp_path, 'train') == ''
  wait_until(lambda: on_host(tmp_path, 'state').endswith(': running: ready\n'))
  assert on_host(tmp_path, 'train') == 'already training\n'
  on_host(tmp_path, 'stop')
  assert on_host(tmp_path, 'state').endswith('exit code 75: exiting\n')
  assert (tmp_path / 'train.log').read_text().count('ready') == 1


def test_a_failed_request(cloud, bin_dir, tmp_path, capfd):
  stand_in(
    bin_dir / 'gcloud',
    'case "$*" in *describe*) [ ! -e "$NOTES/made" ] || echo FAILED ;;\n'
    '*create*) touch "$NOTES/made" ;; esac\n',
  )
  out = tmp_path / 'out'
  assert launch.main([*TPU_VM, f'--out={out}', '--run']) == 1
  error = capfd.readouterr().err
  assert 'error: the queued resource is FAILED' in error
  last = error.splitlines()[-1]
  assert last == (
    f'error: bash {out}/slice.sh create: exit code 1. To undo what was '
    f'started: bash {out}/slice.sh delete'
  )


def prepare_host(tmp_path, **settings):
  settings = {
    'HOSTS': '4',
    'SPOT': 'no',
    'WORKDIR': tmp_path / 'run',
  } | settings
  empty = dict.fromkeys(('WORKDIR_MOUNT', 'DATA_DIR', 'DATA_DISK'), '')
  script = 'scripts/launch/prepare_host.sh'
  return run('bash', script, **{**empty, **settings})


@pytest.mark.parametrize(
  'settings, expected',
  [
    ({}, 'is local to this host, but 4 hosts must share it'),
    ({'HOSTS': '1', 'SPOT': 'yes'}, 'is on the boot disk'),
    ({'WORKDIR': '/proc/no/run'}, '/proc/no/run cannot be created'),
    ({'HOSTS': '1', 'DATA_DIR': '/no/data'}, '/no/data does not exist'),
    (
      {'HOSTS': '1', 'DATA_DIR': '/no/data', 'DATA_DISK': 'd'},
      'disk d is not attached',
    ),
  ],
)
def test_an_unsuitable_host(settings, expected, cloud, bin_dir, tmp_path):
  stand_in(bin_dir / 'stat', 'echo 1\n')
  stand_in(bin_dir / 'lsblk', 'echo "/dev/sda1 ext4 /"\n')
  prepared = prepare_host(tmp_path, **settings)
  assert prepared.returncode == 1
  (error,) = [
    line for line in prepared.stderr.splitlines() if 'warning' not in line
  ]
  assert error.startswith('error: ') and expected in error


@pytest.mark.parametrize(
  'workdir, denied, expected',
  [
    ('gs://bucket/run', None, ''),
    (
      'gs://bucket/run',
      'storage.objects.create',
      'error: --workdir=gs://bucket/run: this account lacks '
      'storage.objects.create. Grant it roles/storage.objectUser on '
      'gs://bucket.\n',
    ),
    (
      'gs://another/run',
      None,
      'error: gs://another/run: does not exist, or there is no bucket of this '
      'name.\n',
    ),
  ],
)
def test_a_host_checks_the_bucket(
  workdir, denied, expected, cloud, bin_dir, bucket, copied, tmp_path
):
  """Once what this requires is installed; nothing is made or mounted."""
  if denied:
    bucket.denied.add(denied)
  stand_in(bin_dir / 'python3', TRAINING)
  settings = {'WORKDIR': workdir, 'SPOT': 'yes'}
  prepared = prepare_host(tmp_path, cwd=copied, **settings)
  assert prepared.stderr == expected
  assert prepared.returncode == bool(expected)
  assert 'requirements-tpu.txt' in (cloud / 'pip').read_text()
  assert not (cloud / 'mounts').exists() and not (copied / 'gs:').exists()
  assert bucket.objects == {}


def test_a_host_with_an_old_python(cloud, bin_dir, copied, tmp_path):
  """Python 3.11 is installed: images of TPU VMs have 3.10."""
  stand_in(
    bin_dir / 'python3',
    'echo "$@" >>"$NOTES/old"\n'
    'case "$*" in -c*) exit 1 ;; *find*) echo "$NOTES/python3.11" ;; esac\n',
  )
  stand_in(cloud / 'python3.11', PYTHON)
  assert prepare_host(tmp_path, cwd=copied).returncode == 0
  assert '-m uv python install --quiet 3.11' in (cloud / 'old').read_text()
  assert (cloud / 'pip').read_text().endswith('-r requirements-tpu.txt\n')


@pytest.mark.parametrize(
  'arguments, expected',
  [
    (SKY, 'sky jobs launch --yes --detach-run {}/sky.yaml'),
    ((*SKY, SOURCE), 'sky jobs launch --yes --detach-run {}/sky.yaml'),
    (
      (*SLURM, '--sbatch=--comment=a b', '--sbatch=--qos=c'),
      'sbatch --comment=a b --qos=c {}/job.sh',
    ),
  ],
)
def test_run_submits(arguments, expected, cloud, bin_dir, tmp_path):
  for name in ('sky', 'sbatch'):
    stand_in(bin_dir / name, f'echo {name} "$@" >>"$NOTES/submitted"')
  out = tmp_path / 'o ut'
  write(out, [*arguments, '--run'])
  assert lines(cloud / 'submitted') == [expected.format(out)]
  assert (out / 'source').exists() == (arguments == SKY)


def test_sky_task_runs(cloud, copied, tmp_path):
  """Its setup and run, in a repository of stand-ins."""
  awkward = [
    f'--config.data.data_dir={AWKWARD}',
    '--config.init_from=a  b',
  ]
  task = sky_task(tmp_path / 'out', *awkward)
  set_ends(cloud, 75, 3)
  environment = {
    **task['envs'],
    'WORKDIR': str(tmp_path / 'run'),
    'DATA_DIR': str(tmp_path),
  }
  codes = [
    run('bash', '-c', task[step], cwd=copied, **environment).returncode
    for step in ('setup', 'run')
  ]
  assert codes == [0, 3]
  assert arguments_of_runs(cloud) == [[*TRAIN, DATA, *awkward]] * 2


# Mistakes.

DIGITS = ('--config=configs/bn_x30.py:mini', '--config.batch_size=128')
UNSHARED = without('--shared_workdir', TPU_VM)
UNSHARED_SKY = without('--shared_workdir', SKY)
ABSOLUTE = 'use an absolute path on the hosts'
FOLDER = '--config.data.data_dir: must name the folder'


@pytest.mark.parametrize(
  'arguments',
  [
    (*UNSHARED, '--topology=v5e:2x4'),
    (*UNSHARED_SKY, '--workdir_mount=10.0.0.2:/runs'),
    (*without(DATA, TPU_VM), *DIGITS),
    without(DATA, SLURM),
  ],
)
def test_no_mistakes(arguments, tmp_path):
  assert write(tmp_path / 'out', arguments)


@pytest.mark.parametrize(
  'arguments, expected',
  [
    ((*TPU_VM, '--topology=v5e:3x3'), 'Use one of v5e:1x1, v5e:2x2'),
    ((*SKY, '--topology=v9:2x2'), 'no such TPU'),
    ((*TPU_VM, '--config.batch_size=40'), 'not a multiple of the 16 devices'),
    (
      (*SLURM, '--nodes=3', '--gpus=8', '--config.batch_size=32'),
      'not a multiple of the 24 devices. Use one that is, such as 48, or',
    ),
    ((*TPU_VM, '--config.model.dtype=float64'), 'TPUs have no float64'),
    ((*SLURM, '--config.model.dtype=float64'), 'GPUs are slow'),
    ((*TPU_VM, '--config.optim.rate=1'), "Did you mean 'optim."),
    ((*TPU_VM, '--config=configs/no.py'), 'no such file'),
    ((*TPU_VM, '--config=/etc/hostname'), ''),
    ((*TPU_VM, '--config=OUTSIDE/bn_x30.py'), 'is outside the repository'),
    ((*TPU_VM, '--out=/proc/no/out'), '/proc/no'),
    ((*TPU_VM, '--name=Bn'), '--name=Bn: use'),
    ((*TPU_VM, '--name=bn-'), '--name=bn-: use'),
    ((*TPU_VM, '--name=../bn'), '--name=../bn: use'),
    ((*SLURM, '--name=a\nb'), 'lower-case letters'),
    ((*TPU_VM, '--workdir=runs/bn'), ABSOLUTE),
    ((*TPU_VM, '--workdir=gs://'), 'must be a path or gs://BUCKET/NAME'),
    ((*SKY, '--workdir=gs://runs'), 'must be a path or gs://BUCKET/NAME'),
    ((*TPU_VM, '--workdir=gs:/runs/bn'), 'must be a path or gs://BUCKET/NAME'),
    ((*TPU_VM, '--workdir=s3://runs/bn'), 'must be a path'),
    (
      (*TPU_VM, '--workdir=gs://runs/bn'),
      '--shared_workdir: a workdir in a bucket needs no mount. Omit it.',
    ),
    (
      (*in_bucket(SKY), '--workdir_mount=10.0.0.2:/runs'),
      '--workdir_mount: a workdir in a bucket needs no mount. Omit it.',
    ),
    (in_bucket(SLURM), 'Name a folder that all nodes share, such as /shared/'),
    (
      (*TPU_VM, '--config.data.data_dir=gs://b/imagenet'),
      'mount it (gcsfuse --implicit-dirs BUCKET FOLDER) and name the folder',
    ),
    ((*TPU_VM, '--workdir=/runs'), ABSOLUTE),
    ((*SLURM, '--config.data.data_dir=data'), ABSOLUTE),
    (without(DATA, TPU_VM), FOLDER),
    (without(DATA, SKY), FOLDER),
    ((*without(DATA, SKY), *DIGITS, '--data_bucket=gs://b'), FOLDER),
    (UNSHARED, '4 hosts must share it. Use gs://BUCKET/NAME; or give --work'),
    (
      (*UNSHARED, '--topology=v5e:2x4', '--spot'),
      'must outlive a preempted spot slice. Use gs://BUCKET/NAME; or give',
    ),
    ((*UNSHARED_SKY, '--topology=v5e:2x4'), 'a preempted spot slice'),
    ((*TPU_VM, '--project='), "--project: '' is not of the form NAME"),
    ((*TPU_VM, '--zone='), "--zone: '' is not of the form NAME"),
    ((*TPU_VM, '--gcloud='), "'' is not of the form --OPTION"),
    ((*SLURM, '--sbatch='), "'' is not of the form --OPTION"),
    ((*SKY, '--data_bucket=b'), "'b' is not of the form gs://BUCKET"),
    ((*SKY, '--source=https://a.b/c'), 'is not of the form URL#REVISION'),
    ((*SKY, '--workdir_mount=runs'), 'is not of the form SERVER:/SHARE'),
    ((*TPU_VM, '--gcloud=network'), 'is not of the form --OPTION'),
    ((*TPU_VM, '--gcloud=--labels=a\nb'), r"'--labels=a\nb' is not of"),
    ((*TPU_VM, '--gcloud_ssh=--plain\x1b'), 'is not of the form --OPTION'),
    ((*SLURM, '--sbatch=--comment=a\n#SBATCH -w x'), 'is not of the form'),
    ((*SLURM, '--sbatch=job.sh'), 'is not of the form --OPTION'),
    ((*TPU_VM, '--project=P\nx'), r"'P\nx' is not of the form NAME"),
    ((*TPU_VM, '--data_disk=d\tx'), 'is not of the form DISK'),
    ((*SKY, '--infra=gcp/a\nx'), 'is not of the form gcp/REGION/ZONE'),
    ((*SKY, '--source=https://a.b/c#v\n1'), 'is not of the form URL#REVISION'),
    ((*SLURM, '--workdir=/runs/a\nb'), 'not contain control characters'),
    ((*SLURM, '--out=x\n#SBATCH -w x'), 'not contain control characters'),
    ((*SLURM, '--gpus=0'), "'0' is not a whole number of at least 1"),
    ((*SLURM, '--topology=v5e:4x4'), 'unrecognized arguments'),
    (('--config.seed=1', *SLURM), 'unrecognized arguments: --config.seed=1'),
    (('--sweep.seed=1', *SLURM), 'unrecognized arguments: --sweep.seed=1'),
    (without('--workdir=', TPU_VM), 'required: --workdir'),
    (('vm', *TPU_VM[1:]), 'invalid choice'),
    ((), 'required: PLACE'),
    ((*TPU_VM, '--run'), 'gcloud: not found'),
    ((*SKY, '--run'), 'sky: not found'),
    ((*SLURM, '--run'), 'sbatch: not found'),
    (
      without('--config=', SLURM),
      'nothing to train. Give --config or --sweep.',
    ),
    (
      (*SLURM_SWEEP, '--sweep=configs/sweeps/none.py'),
      'no such file. There are: configs/',
    ),
    ((*SLURM_SWEEP, '--sweep.sed=1'), '--sweep.sed: no such axis'),
    (
      (*SLURM_SWEEP, '--gpus=4', '--config.batch_size=31'),
      'config.batch_size=31: not a multiple of the 4 devices',
    ),
    (TPU_VM_SWEEP, 'has 4 hosts, but a sweep runs on one'),
  ],
)
def test_mistakes(arguments, expected, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('PATH', str(tmp_path))
  shutil.copy('configs/bn_x30.py', tmp_path)
  default = ROOT / 'launch'
  before = default.exists()
  out = tmp_path / 'out'
  arguments = [a.replace('OUTSIDE', str(tmp_path)) for a in arguments]
  arguments[1:1] = [f'--out={out}'] if arguments else []
  error = refuse(arguments, capsys)
  assert expected in error
  assert '--name=a\nb' in arguments or len(error.splitlines()) == 1
  assert not out.exists() and default.exists() == before


def test_no_credentials(cloud, tmp_path, capsys):
  (cloud / 'credentials').unlink()
  out = tmp_path / 'out'
  error = refuse([*TPU_VM, f'--out={out}', '--run'], capsys)
  assert error == (
    'error: gcloud has no credentials (ERROR: no account). Run: gcloud init\n'
  )
  assert not out.exists()
  assert calls(cloud) == ['auth print-access-token']


def test_another_launch_is_not_overwritten(tmp_path, capsys):
  out = tmp_path / 'out'
  before = write(out, TPU_VM)
  assert write(out, TPU_VM) == before
  capsys.readouterr()
  for arguments in ((*TPU_VM, '--spot'), SKY, SLURM):
    (error,) = refuse([*arguments, f'--out={out}'], capsys).splitlines()
    assert 'belongs to another launch' in error
  assert {p.name: p.read_text() for p in out.iterdir()} == before
  (out / 'slice.sh').write_bytes(b'\xff\0')
  (error,) = refuse([*TPU_VM, f'--out={out}'], capsys).splitlines()
  assert 'its slice.sh belongs to another launch' in error


# Help.


@pytest.mark.parametrize('place', [None, *PLACES])
def test_help(place):
  """It takes less than a second of CPU time, and no JAX."""
  program = (
    'import sys; sys.path.insert(0, "scripts"); import launch\n'
    f'try: launch.main([*{[place] if place else []}, "--help"])\n'
    'finally: assert not {"jax", "numpy"} & set(sys.modules)'
  )
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  said = run(sys.executable, '-c', program)
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert said.returncode == 0, said.stderr
  for name in [place] if place else PLACES:
    assert f'python scripts/launch.py {name} --name=bn-x30' in said.stdout
  assert sum(after[:2]) - sum(before[:2]) < 1


if __name__ == '__main__':
  os.chdir(ROOT)
  for each in PLACES:
    shutil.rmtree(GOLDEN / each, ignore_errors=True)
    write(GOLDEN / each, launch_arguments.examples()[each][2:])
