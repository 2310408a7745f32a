"""Launching without a cloud: what is written, and what it does with stand-ins.

The files that the examples of `--help` write are kept under
`tests/scripts/launch/`; `python tests/scripts/launch_test.py` writes them anew.
"""

import os
from pathlib import Path
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
import launch

from bn_repro import config as config_lib

GOLDEN = Path(__file__).with_name('launch')
LOOP = ROOT / 'scripts' / 'train_loop.sh'
# An override that does not survive careless quoting.
AWKWARD = '/mnt/it\'s "a $HOME" \\ of; `x`,y'

DATA = '--config.data.data_dir=/mnt/data'
TPU_VM = (
  'tpu-vm',
  '--name=bn-x30',
  '--topology=v5e:4x4',
  '--project=P',
  '--zone=Z',
  '--config=configs/bn_x30.py',
  '--workdir=/mnt/runs/bn_x30',
  '--shared_workdir',
  DATA,
)
SKY = (
  'sky',
  '--name=bn-x30',
  '--topology=v5e:4x4',
  '--config=configs/bn_x30.py',
  '--workdir=/mnt/runs/bn_x30',
  '--shared_workdir',
  DATA,
)
SLURM = (
  'slurm',
  '--name=bn-x30',
  '--config=configs/bn_x30.py',
  '--workdir=/mnt/runs/bn_x30',
)


def example(place):
  """The command of a place that `--help` shows, without the program."""
  lines = launch._EXAMPLES[place].replace('\\\n', '')
  return shlex.split(lines)[2:]


def write(out, arguments):
  assert launch.main([*arguments, f'--out={out}']) == 0
  return {path.name: path.read_text() for path in out.iterdir()}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
  monkeypatch.chdir(ROOT)


# What is written.


@pytest.mark.parametrize('place', launch._EXAMPLES)
def test_golden(place, tmp_path):
  found = write(tmp_path / 'out', example(place))
  expected = {p.name: p.read_text() for p in (GOLDEN / place).iterdir()}
  assert {
    name: text.replace(str(tmp_path / 'out'), f'tests/scripts/launch/{place}')
    for name, text in found.items()
  } == expected


def test_shell_is_sound(tmp_path):
  """Of all scripts here, and of those written for awkward arguments."""
  for number, arguments in enumerate((TPU_VM, SLURM)):
    write(
      tmp_path / f'it is {number}',
      [
        *arguments,
        f'--config.data.data_dir={AWKWARD}',
        '--config.init_from=a\nb',
      ],
    )
  files = [
    *(ROOT / 'scripts').rglob('*.sh'),
    *GOLDEN.rglob('*.sh'),
    *tmp_path.rglob('*.sh'),
  ]
  assert len(files) >= 14
  for file in files:
    subprocess.run(['bash', '-n', file], check=True)
  path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
  shellcheck = shutil.which('shellcheck', path=path)
  checked = subprocess.run(
    [shellcheck, '--shell=bash', *files],
    capture_output=True,
    text=True,
    check=False,
  )
  assert checked.returncode == 0, checked.stdout


# Of SkyPilot's own schema, the fields that are used here.
TEXT = {'type': 'string'}
SKY_SCHEMA = {
  'type': 'object',
  'additionalProperties': False,
  'required': ['resources', 'run'],
  'properties': {
    'name': TEXT,
    'workdir': {
      'anyOf': [
        TEXT,
        {
          'type': 'object',
          'additionalProperties': False,
          'required': ['url'],
          'properties': {'url': TEXT, 'ref': TEXT},
        },
      ]
    },
    'resources': {
      'type': 'object',
      'additionalProperties': False,
      'properties': {
        'infra': {'type': 'string', 'pattern': '^gcp(/[^/]+(/[^/]+)?)?$'},
        'accelerators': TEXT,
        'accelerator_args': {
          'type': 'object',
          'additionalProperties': False,
          'properties': {'runtime_version': TEXT},
        },
        'use_spot': {'type': 'boolean'},
        'job_recovery': {
          'type': 'object',
          'additionalProperties': False,
          'properties': {
            'strategy': TEXT,
            'max_restarts_on_errors': {'type': 'integer', 'minimum': 0},
            'recover_on_exit_codes': {
              'type': 'array',
              'uniqueItems': True,
              'items': {'type': 'integer', 'minimum': 0, 'maximum': 255},
            },
          },
        },
      },
    },
    'file_mounts': {
      'type': 'object',
      'additionalProperties': {
        'type': 'object',
        'additionalProperties': False,
        'properties': {
          'source': {'type': 'string', 'pattern': '^gs://'},
          'mode': {'enum': ['MOUNT', 'COPY', 'MOUNT_CACHED']},
        },
      },
    },
    'envs': {
      'type': 'object',
      'additionalProperties': False,
      'patternProperties': {'^[a-zA-Z_][a-zA-Z0-9_]*$': TEXT},
    },
    'setup': TEXT,
    'run': TEXT,
  },
}


def sky_task(out, *arguments):
  text = write(out, [*SKY, *arguments])['sky.yaml']
  task = yaml.safe_load(text)
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
def test_sky_task(topology, accelerators, runtime_version, tmp_path):
  resources = sky_task(
    tmp_path / 'out', f'--topology={topology}', '--infra=gcp/us-west4'
  )['resources']
  assert resources == {
    'infra': 'gcp/us-west4',
    'accelerators': accelerators,
    'accelerator_args': {'runtime_version': runtime_version},
    'use_spot': True,
    'job_recovery': {'recover_on_exit_codes': [75]},
  }


def test_sky_source_and_data(tmp_path):
  task = sky_task(
    tmp_path / 'out',
    '--source=https://example.org/me/bn#v1.2',
    '--config.data.data_dir=/mnt/data',
    '--data_bucket=gs://images',
  )
  assert task['workdir'] == {'url': 'https://example.org/me/bn', 'ref': 'v1.2'}
  assert task['file_mounts'] == {
    '/mnt/data': {'source': 'gs://images', 'mode': 'MOUNT'}
  }
  assert task['envs']['DATA_DIR'] == '/mnt/data'
  assert sky_task(tmp_path / 'local')['workdir'] == '.'


@pytest.mark.parametrize(
  'arguments, expected',
  [
    ((), '6,000,000 steps of 32: 192,000,000 images, 149.9 epochs'),
    (
      ('--config.batch_size=512',),
      '6,000,000 steps of 512: 3,072,000,000 images, 2,397.8 epochs',
    ),
    (
      ('--config.data.name=imagenet_stand_in',),
      '6,000,000 steps of 32: 192,000,000 images',
    ),
    (('--config.total_steps=0', '--config.total_epochs=2.5'), '2.5 epochs'),
  ],
)
def test_says_how_much_is_trained(arguments, expected, tmp_path, capsys):
  write(tmp_path / 'out', [*TPU_VM, *arguments])
  assert f'\nThey train {expected}.\n' in capsys.readouterr().out


# The loop.


@pytest.fixture
def bin_dir(tmp_path, monkeypatch):
  """A folder for stand-ins, first on the path."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')
  return folder


def stand_in(path, script):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'#!/usr/bin/env bash\n{script}')
  path.chmod(0o755)


# Ends as the next line of the file `ends` says, and notes its arguments.
ENDS = r"""
printf '%s\0' "$@" >>"$NOTES/arguments"
printf '\n' >>"$NOTES/arguments"
end=$(head -n 1 "$NOTES/ends")
sed -i 1d "$NOTES/ends"
case $end in
  SIG*) kill -s "${end#SIG}" $$ ;;
  *) exit "$end" ;;
esac
"""


@pytest.fixture
def notes(tmp_path, monkeypatch, bin_dir):
  """Where stand-ins find what to do and write down what they did."""
  folder = tmp_path / 'notes'
  folder.mkdir()
  monkeypatch.setenv('NOTES', str(folder))
  stand_in(bin_dir / 'train', ENDS)
  stand_in(bin_dir / 'sleep', 'echo "$1" >>"$NOTES/pauses"\n')
  return folder


def loop(notes, ends, **environment):
  (notes / 'ends').write_text(''.join(f'{end}\n' for end in ends))
  return subprocess.run(
    ['bash', LOOP, 'train', 'a b', '$c'],
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    timeout=30,
    check=False,
  )


def arguments_of_runs(notes):
  runs = (notes / 'arguments').read_text().split('\n')[:-1]
  return [run.split('\0')[:-1] for run in runs]


@pytest.mark.parametrize(
  'ends, code',
  [
    ([75, 75, 0], 0),
    ([0], 0),
    ([1], 1),
    ([3], 3),
    ([2], 2),
    ([127], 127),
    ([134, 0], 0),
    (['SIGKILL', 'SIGABRT', 75, 3], 3),
    ([75, 1], 1),
  ],
)
def test_loop(ends, code, notes):
  ended = loop(notes, [*ends, 99])
  assert ended.returncode == code
  assert arguments_of_runs(notes) == [['a b', '$c']] * len(ends)
  assert ended.stderr.splitlines()[-1].endswith(f'exit code {code}: ends')


def test_pauses_grow_and_are_bounded(notes):
  loop(notes, [75] * 6 + [0])
  assert (notes / 'pauses').read_text() == '10\n20\n40\n60\n60\n60\n'


def test_pauses_do_not_grow_while_runs_last(notes):
  loop(notes, [75] * 12 + [0], LASTING='0')
  assert (notes / 'pauses').read_text().split() == ['10'] * 12


def test_runs_that_end_early_are_given_up(notes):
  ended = loop(notes, [75] * 20)
  assert ended.returncode == 1
  assert len(arguments_of_runs(notes)) == 10
  assert 'error: exit code 75, and 10 runs in a row' in ended.stderr
  assert ended.stderr.endswith('exit code 1: ends\n')


SAVES = """
import signal, sys, time
def save(number, frame):
  print('told', number, flush=True)
  time.sleep(0.5)
  sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print('ready', flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once(number, tmp_path):
  """SIGINT goes to all processes of the terminal, as Ctrl-C does."""
  with subprocess.Popen(
    ['bash', LOOP, sys.executable, '-c', SAVES],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  ) as process:
    assert process.stdout.readline() == 'ready\n'
    send = os.killpg if number == signal.SIGINT else os.kill
    send(process.pid, number)
    said, _ = process.communicate(timeout=20)
  assert said == f'told {int(signal.SIGTERM)}\n'
  assert process.returncode == 75


def test_a_signal_ends_a_pause(bin_dir, notes):
  (bin_dir / 'sleep').unlink()
  (notes / 'ends').write_text('75\n0\n')
  with subprocess.Popen(
    ['bash', LOOP, 'train'], stderr=subprocess.PIPE, text=True
  ) as process:
    while 'again in' not in process.stderr.readline():
      pass
    process.terminate()
    process.communicate(timeout=20)
  assert process.returncode == 75
  assert len(arguments_of_runs(notes)) == 1


def test_a_signal_before_the_process_is_known(tmp_path):
  """One that comes as the run starts is passed on all the same."""
  text = LOOP.read_text()
  hurried = tmp_path / 'loop.sh'
  hurried.write_text(
    text.replace('  process=$!\n', '  kill -TERM $$\n  process=$!\n', 1)
  )
  assert hurried.read_text() != text
  ended = subprocess.run(
    ['bash', hurried, 'sleep', '60'], timeout=20, check=False
  )
  assert ended.returncode == 143


# A batch job.


@pytest.fixture
def batch(tmp_path, bin_dir, notes, monkeypatch):
  """Writes a job and starts it in a repository of stand-ins."""
  repository = tmp_path / 'repository'
  (repository / 'scripts').mkdir(parents=True)
  shutil.copy(LOOP, repository / 'scripts')
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
    bin_dir / 'srun',
    'echo "${@:1:3}" >"$NOTES/srun"; shift 3; exec "$@"\n',
  )
  stand_in(bin_dir / 'scontrol', 'echo "$@" >"$NOTES/scontrol"\n')

  def start(*arguments):
    write(tmp_path / 'out', [*SLURM, *arguments])
    return subprocess.Popen(
      ['bash', tmp_path / 'out' / 'job.sh'],
      cwd=repository,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return start


@pytest.mark.parametrize('ends, code', [([0], 0), ([3], 3), ([134, 75, 1], 1)])
def test_batch_job_ends(ends, code, batch, notes):
  (notes / 'ends').write_text(''.join(f'{end}\n' for end in ends))
  with batch(f'--config.data.data_dir={AWKWARD}') as process:
    process.communicate(timeout=20)
  assert process.returncode == code
  assert arguments_of_runs(notes) == [
    [
      '-m',
      'bn_repro.main',
      '--config=configs/bn_x30.py',
      '--workdir=/mnt/runs/bn_x30',
      f'--config.data.data_dir={AWKWARD}',
    ]
  ] * len(ends)
  assert not (notes / 'scontrol').exists()


@pytest.mark.parametrize(
  'plugin, code', [('jax_cuda12_plugin', 0), ('jax_rocm7_plugin', 1)]
)
def test_batch_job_takes_jax_for_gpus(plugin, code, batch, notes):
  """Of either CUDA that requirements-gpu.txt allows."""
  (notes / 'plugins').write_text(f'{plugin}\n')
  (notes / 'ends').write_text('0\n')
  with batch() as process:
    _, error = process.communicate(timeout=20)
  assert process.returncode == code
  assert ('error: .venv has no JAX for GPUs' in error) == bool(code)


def test_batch_job_is_put_back_when_its_time_is_over(batch, notes):
  with batch() as process:
    assert process.stdout.readline() == 'ready\n'
    process.terminate()
    said, _ = process.communicate(timeout=20)
  assert said == f'told {int(signal.SIGTERM)}\n'
  assert process.returncode == 75
  assert (notes / 'scontrol').read_text() == 'requeue 17\n'


@pytest.mark.parametrize(
  'tasks, num_tasks, cpus, devices',
  [('node', 1, 16, '0,1,2,3'), ('gpu', 4, 4, 'none')],
)
def test_batch_job_tasks(
  tasks, num_tasks, cpus, devices, batch, notes, tmp_path
):
  (notes / 'ends').write_text('0\n')
  with batch('--gpus=4', '--cpus_per_gpu=4', f'--tasks={tasks}') as process:
    process.communicate(timeout=20)
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
  assert (notes / 'devices').read_text() == f'{devices}\n'
  assert (
    (notes / 'srun').read_text()
    == f'--gpu-bind=none --kill-on-bad-exit=0 --cpus-per-task={cpus}\n'
  )


SWEEP = (
  '--sweep=configs/sweeps/lr_multipliers.py:full',
  '--sweep.seed=0,1,2',
  '--config.bn.momentum=0.99',
)
SWEEP_COMMAND = [
  '-m',
  'bn_repro.sweep',
  '--sweep=configs/sweeps/lr_multipliers.py:full',
  '--workdir=/mnt/runs/lr',
  '--sweep.seed=0,1,2',
  '--config.bn.momentum=0.99',
]
# Written twice: the name is what it is found by, the workdir where it lies.
OF_SWEEP = ('--name=lr', '--workdir=/mnt/runs/lr', *SWEEP)


def test_an_array_of_a_sweep(batch, notes, bin_dir, monkeypatch, capsys):
  """Each of its jobs is a trial, and is put back by itself."""
  monkeypatch.setenv('SLURM_ARRAY_TASK_ID', '41')
  stand_in(bin_dir / 'sbatch', 'printf "%s\\n" "$@" >"$NOTES/submitted"')
  (notes / 'ends').write_text('3\n')
  with batch('--config=', *OF_SWEEP, '--run') as process:
    process.communicate(timeout=20)
  assert process.returncode == 3
  assert arguments_of_runs(notes) == [[*SWEEP_COMMAND, '--trial=41']]
  assert (notes / 'submitted').read_text().startswith('--array=0-41\n')
  said = capsys.readouterr().out
  assert 'They train 42 trials, the first 31,000,000 steps of 32' in said
  comparing = shlex.join(['python', *SWEEP_COMMAND, '--compare'])
  assert comparing in said


def test_managed_jobs_of_a_sweep(cloud, tmp_path, bin_dir):
  """A job a trial, each told its number; all are cancelled together."""
  stand_in(tmp_path / 'bin' / 'git', 'echo 0123\n')
  stand_in(bin_dir / 'sky', 'echo "$@" >>"$NOTES/submitted"')
  out = tmp_path / 'out'
  arguments = [*without('--config=', SKY), *OF_SWEEP, '--sweep.multiplier=1,5']
  assert launch.main([*arguments, f'--out={out}', '--run']) == 0
  lines = (cloud / 'submitted').read_text().splitlines()
  assert lines == [
    f'jobs launch --yes --detach-run --name lr-{number} --env TRIAL={number} '
    f'--env REVISION=0123 {out}/sky.yaml'
    for number in range(12)
  ]
  task = yaml.safe_load((out / 'sky.yaml').read_text())
  for number, expected in (('7', ['--trial=7']), ('', [])):
    found = subprocess.run(
      ['bash', '-c', f'bash() {{ printf "%s\\n" "$@"; }}\n{task["run"]}'],
      env={**os.environ, 'TRIAL': number},
      capture_output=True,
      text=True,
      check=True,
    ).stdout.splitlines()
    command = ['python', *SWEEP_COMMAND, '--sweep.multiplier=1,5', DATA]
    assert found[0] == 'scripts/train_loop.sh'
    assert sorted(found[1:]) == sorted([*command, *expected])


def test_a_sweep_on_a_tpu_vm(tmp_path, capsys):
  """One trial at a time on one host; more hosts than one are refused."""
  arguments = [*without('--config=', TPU_VM), *OF_SWEEP]
  out = tmp_path / 'out'
  assert launch.main([*arguments, f'--out={out}']) == 1
  assert 'has 4 hosts, and a sweep runs on one' in capsys.readouterr().err
  assert not out.exists()
  assert not launch.main([*arguments, '--topology=v5e:2x4', f'--out={out}'])
  text = (out / 'host.sh').read_text()
  assert 'bn_repro.sweep' in text
  assert '--jobs=1' in text


@pytest.mark.parametrize(
  'arguments, expected',
  [
    ((), '--config or --sweep: say what to train.'),
    (('--sweep=configs/sweeps/none.py',), 'no such file. There are: configs/'),
    ((*SWEEP, '--sweep.sed=1'), '--sweep.sed: no such axis'),
    (
      (*SWEEP, '--config.batch_size=31'),
      'config.batch_size=31: not a multiple of the 4 devices',
    ),
  ],
)
def test_bad_sweeps(arguments, expected, tmp_path, capsys):
  out = tmp_path / 'out'
  launched = [*without('--config=', SLURM), '--gpus=4', *arguments]
  assert launch.main([*launched, f'--out={out}']) == 1
  (error,) = capsys.readouterr().err.splitlines()
  assert expected in error
  assert not out.exists()


def test_jax_takes_one_gpu_a_process_under_slurm(monkeypatch):
  """What the batch job has to know of JAX, if a new version still does it."""
  from jax._src import clusters

  for name, value in {
    'JOB_ID': '17',
    'STEP_NODELIST': 'a[1-2]',
    'NTASKS': '4',
    'PROCID': '3',
    'LOCALID': '1',
  }.items():
    monkeypatch.setenv(f'SLURM_{name}', value)
  found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
    None, None, None, None, 'slurm', 10
  )
  assert found[1:] == (4, 3, [1])


# A cloud of two hosts, which are folders.

CLOUD = r"""
case "$*" in *' describe '*) ;; *) printf '%s\n' "$*" >>"$NOTES/calls" ;; esac
[ ! -e "$NOTES/fails" ] || [[ $* != *$(cat "$NOTES/fails")* ]] || exit 1
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
    [ -e "$states" ] || exit 1
    head -n 1 "$states"
    [ "$(wc -l <"$states")" -eq 1 ] || sed -i 1d "$states" ;;
  *' queued-resources delete '*)
    rm -rf "$states" "${hosts[@]}" ;;
  *' tpu-vm scp '*)
    for host in "${hosts[@]}"; do cp "${files[@]}" "$host/$target"; done ;;
  *' tpu-vm ssh '*)
    for host in "${hosts[@]}"; do
      (cd "$host" && HOME=$host bash -c "$command") || exit
    done ;;
esac
"""
# Makes environments without installing, and trains as `ends` says.
PYTHON = f"""
case "$1 $2" in
  '-m venv') mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  '-m pip') echo "$@" >>"$NOTES/pip" ;;
  '-m bn_repro.main') {{ flock 9; {ENDS} }} 9>"$NOTES/lock" ;;
esac
"""


@pytest.fixture
def cloud(bin_dir, notes, monkeypatch):
  """Stand-ins for the cloud, and for what its hosts would install and mount."""
  (notes / 'credentials').touch()
  monkeypatch.setenv('INTERVAL', '0')
  stand_in(bin_dir / 'ssh-add', 'exit 2\n')  # No agent.
  stand_in(bin_dir / 'gcloud', CLOUD)
  stand_in(bin_dir / 'python3', PYTHON)
  stand_in(bin_dir / 'sudo', 'exec "$@"\n')
  stand_in(bin_dir / 'mount', 'echo "$@" >>"$NOTES/mounts"\n')
  stand_in(bin_dir / 'mount.nfs', '')
  stand_in(bin_dir / 'mountpoint', 'exit 1\n')
  stand_in(
    bin_dir / 'lsblk', 'echo "/dev/sda1 ext4 /"; echo "/dev/sdb ext4 "\n'
  )
  # Every file system but / is another one.
  stand_in(bin_dir / 'stat', 'echo "${*: -1}"\n')
  return notes


def calls(notes):
  """What gcloud was asked to do, without where."""
  found = []
  for line in (notes / 'calls').read_text().splitlines():
    line = re.sub(' --(project|zone)=[PZ]', '', line)
    line = line.removeprefix('compute tpus ')
    if 'tpu-vm ssh' in line:
      worker, command = re.search('--worker=(.*) --command=(.*)', line).groups()
      line = f'{worker}: {command}'
    found.append(line)
  (notes / 'calls').unlink()
  return found


def verb(out, *words, cwd=ROOT):
  return subprocess.run(
    ['bash', out / 'slice.sh', *words],
    cwd=cwd,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def wait_until_ended(out):
  give_up = time.monotonic() + 30
  while (said := verb(out, 'state').stdout).count(': ended: ') < 2:
    assert time.monotonic() < give_up, said
    time.sleep(0.1)
  return said


def test_from_nothing_to_deletion(cloud, tmp_path, capfd):
  """All that needs no cloud is done: packing, copying, two hosts' loops."""
  out = tmp_path / 'out'
  # Each of two hosts is stopped once.
  (cloud / 'ends').write_text('75\n75\n0\n0\n')
  share, data = tmp_path / 'share', tmp_path / "the 'data'"
  arguments = [
    *(a for a in TPU_VM if 'workdir' not in a and 'data' not in a),
    f'--workdir={share}/run',
    '--spot',
    '--workdir_mount=10.0.0.2:/runs',
    '--data_disk=imagenet',
    f'--config.data.data_dir={data}',
    f'--config.init_from={AWKWARD}',
    f'--out={out}',
    '--run',
  ]
  assert launch.main(arguments) == 0, capfd.readouterr().err
  said = wait_until_ended(out)
  assert said.startswith('bn-x30: ACTIVE\n')
  assert said.count('exit code 0: ends') == 2
  assert verb(out, 'stop').returncode == 0
  assert verb(out, 'delete').returncode == 0
  assert verb(out, 'state').stdout == 'bn-x30: not there\n'
  found = [call for call in calls(cloud) if not call.endswith('host.sh state')]
  assert found == [
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
  assert (
    arguments_of_runs(cloud)
    == [
      [
        '-m',
        'bn_repro.main',
        '--config=configs/bn_x30.py',
        f'--workdir={share}/run',
        f'--config.data.data_dir={data}',
        f'--config.init_from={AWKWARD}',
      ]
    ]
    * 4
  )
  assert (cloud / 'pip').read_text().count(
    'install'
  ) == 2 and '-r requirements-tpu.txt' in (cloud / 'pip').read_text()
  mounts = (cloud / 'mounts').read_text().splitlines()
  assert (
    mounts
    == [
      f'-t nfs -o hard,sync,lookupcache=positive 10.0.0.2:/runs {share}',
      f'-o ro,noload /dev/sdb {data}',
    ]
    * 2
  )


def elsewhere(out, folder):
  """Has a launch write to a folder of the test; its data are there too."""
  text = (out / 'host.sh').read_text()
  text = text.replace('/mnt/runs', str(folder / 'runs'))
  (out / 'host.sh').write_text(text.replace('/mnt/data', str(folder)))


def test_a_preempted_slice_is_made_anew(cloud, tmp_path):
  """As is one that is preempted while it is set up."""
  out = tmp_path / 'out'
  write(out, [*TPU_VM, '--source=https://example.org/bn#v1', '--spot'])
  (cloud / 'states').write_text('ACTIVE\nSUSPENDING\nSUSPENDED\n')
  (cloud / 'ends').write_text('0\n0\n')
  # The first clone fails: a host is gone.
  stand_in(
    tmp_path / 'bin' / 'git',
    f"""
    echo "$@" >>"$NOTES/git"
    case "$1" in clone)
      [ -e "$NOTES/tried" ] || {{ touch "$NOTES/tried"; exit 1; }}
      mkdir -p "$4" && cp -r {ROOT}/scripts {ROOT}/requirements*.txt "$4" ;;
    esac
    """,
  )
  elsewhere(out, tmp_path)
  kept = verb(out, 'keep')
  assert kept.returncode == 0, kept.stderr
  found = calls(cloud)
  assert [
    c for c in found if 'host.sh state' not in c and 'all: mkdir' not in c
  ] == [
    'queued-resources delete bn-x30 --force',
    'queued-resources create bn-x30 --node-id=bn-x30 '
    '--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite '
    '--spot',
    *(
      f'tpu-vm scp {out}/host.sh bn-x30:bn-x30/ --worker=all',
      'all: bash bn-x30/host.sh set_up',
    )
    * 2,
    'all: bash bn-x30/host.sh train',
  ]
  assert 'exit code 0: ends' in kept.stderr
  assert '-C source checkout --quiet --detach v1' in (cloud / 'git').read_text()


@pytest.mark.parametrize(
  'state, fails',
  [
    ('SUSPENDED', 'queued-resources create'),
    ('ACTIVE', 'tpu-vm scp'),
  ],
)
def test_a_slice_that_cannot_be_made_anew(
  state, fails, cloud, tmp_path, monkeypatch
):
  """It is tried less and less often, and then no more."""
  out = tmp_path / 'out'
  write(out, [*TPU_VM, '--source=https://example.org/bn#v1', '--spot'])
  monkeypatch.setenv('INTERVAL', '30')
  (cloud / 'states').write_text(f'{state}\n')
  (cloud / 'fails').write_text(fails)
  for host in ('host0', 'host1'):
    (cloud / host).mkdir()
  kept = verb(out, 'keep')
  assert kept.returncode == 1
  assert 'error: given up after 8 failures. What is there costs' in kept.stderr
  assert (cloud / 'pauses').read_text().split() == [
    str(30 * 2**n) for n in range(1, 8)
  ]


@pytest.fixture
def repository(tmp_path):
  """A small one, with what hosts take of this one."""
  folder = tmp_path / 'repository'
  shutil.copytree(ROOT / 'scripts', folder / 'scripts')
  for name in ('requirements-tpu.txt', 'kept.txt', 'deleted.txt'):
    (folder / name).write_text('as committed\n')
  identity = ('-c', 'user.name=N', '-c', 'user.email=e')
  for command in ('init', 'add .', 'commit --message=m'):
    subprocess.run(
      ['git', *identity, *command.split()],
      cwd=folder,
      check=True,
      capture_output=True,
    )
  return folder


def test_code_of_a_slice(cloud, repository, tmp_path, capsys):
  """It is what is there when it is set up, and says what it is."""
  out = tmp_path / 'out'
  write(out, TPU_VM)
  elsewhere(out, tmp_path)
  (cloud / 'states').write_text('ACTIVE\n')
  hosts = [cloud / 'host0' / 'bn-x30', cloud / 'host1' / 'bn-x30']
  for host in hosts:
    host.parent.mkdir()
  (repository / 'deleted.txt').unlink()
  (repository / 'new.txt').write_text('new\n')
  for now, words, then in (
    ('first', ['set_up'], 'first'),
    ('second', ['set_up'], 'second'),
    ('third', ['set_up', 'again'], 'second'),
  ):
    (repository / 'kept.txt').write_text(now)
    done = verb(out, *words, cwd=repository)
    assert done.returncode == 0, done.stderr
    assert {(h / 'source/kept.txt').read_text() for h in hosts} == {then}
  source = hosts[1] / 'source'
  assert (source / 'new.txt').exists()
  assert not (source / 'deleted.txt').exists()
  described = subprocess.run(
    ['git', 'rev-parse', 'HEAD'],
    cwd=repository,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()
  assert (source / 'REVISION').read_text() == f'{described}-dirty\n'
  # Another launch of that name does not take up the code of this one.
  for name in ('slice.sh', 'host.sh'):
    (out / name).unlink()
  capsys.readouterr()
  assert launch.main([*TPU_VM, f'--out={out}']) == 1
  assert 'its source.tgz is what the hosts of a' in capsys.readouterr().err


def test_revision_of_a_copy_without_history(tmp_path, monkeypatch):
  """As what is packed has it; it goes into `run.json`."""
  from bn_repro.training import run_info

  of_checkout = run_info.git_revision()
  assert re.fullmatch('[0-9a-f]{40}(-dirty)?', of_checkout)
  monkeypatch.setattr(config_lib, 'ROOT', tmp_path)
  assert run_info.git_revision() == ''
  (tmp_path / 'REVISION').write_text('0123-dirty\n')
  assert run_info.git_revision() == '0123-dirty'


def test_a_host_that_was_restarted_trains_again(cloud, repository, tmp_path):
  """With the code of the others; and the run's exit code is passed on."""
  out = tmp_path / 'out'
  write(out, TPU_VM)
  elsewhere(out, tmp_path)
  (cloud / 'states').write_text('ACTIVE\n')
  hosts = [cloud / 'host0' / 'bn-x30', cloud / 'host1' / 'bn-x30']
  for host in hosts:
    host.parent.mkdir()
  assert verb(out, 'set_up', cwd=repository).returncode == 0
  (repository / 'kept.txt').write_text('edited since\n')
  (cloud / 'ends').write_text('3\n')
  (hosts[0] / 'train.log').write_text('step 7\n')
  with (
    subprocess.Popen(
      ['flock', '--no-fork', hosts[0] / 'lock', 'tail', '-f', '/dev/null']
    ) as running,
    subprocess.Popen(
      ['bash', out / 'slice.sh', 'keep'],
      cwd=repository,
      stderr=subprocess.PIPE,
      text=True,
    ) as keeping,
  ):
    try:
      give_up = time.monotonic() + 30
      log = hosts[1] / 'train.log'
      while not (log.exists() and ': ends' in log.read_text()):
        assert time.monotonic() < give_up and keeping.poll() is None
        time.sleep(0.1)
      # The other host still trains.
      assert keeping.poll() is None
      (hosts[0] / 'train.log').write_text('train_loop: 1 exit code 0: ends\n')
      running.kill()
      keeping.communicate(timeout=30)
    finally:
      running.kill()
      keeping.kill()
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
  topology, held, fingerprint, code, cloud, tmp_path
):
  """Gcloud would refuse to copy to several hosts, once they cost."""
  stand_in(tmp_path / 'bin' / 'ssh-add', f'echo "{held}"; [ -n "{held}" ]\n')
  stand_in(
    tmp_path / 'bin' / 'ssh-keygen',
    f'[ -n "{fingerprint}" ] && echo "2048 {fingerprint} key (RSA)"\n',
  )
  out = tmp_path / 'out'
  write(out, [*TPU_VM, f'--topology={topology}'])
  asked = verb(out, 'create')
  assert asked.returncode == code
  assert ('error: the ssh-agent here does not hold' in asked.stderr) == code
  assert (cloud / 'states').exists() != code


@pytest.mark.parametrize(
  'log, expected',
  [
    (None, 'not running'),
    ('train_loop: 1 runs a\nstep 7\n', 'not running'),  # The host was lost.
    (
      'train_loop: 1 exit code 3: ends\n',
      'ended: train_loop: 1 exit code 3: ends',
    ),
    ('train_loop: 1 exit code 75: ends\ntrain_loop: 2 runs a\n', 'not running'),
  ],
)
def test_state_of_a_host_without_a_loop(log, expected, tmp_path):
  write(tmp_path, TPU_VM)
  if log:
    (tmp_path / 'train.log').write_text(log)
  assert on_host(tmp_path, 'state').endswith(f': {expected}\n')


def on_host(folder, word):
  return subprocess.run(
    ['bash', folder / 'host.sh', word],
    stdout=subprocess.PIPE,
    text=True,
    timeout=30,
    check=True,
  ).stdout


def test_one_loop_on_a_host(tmp_path):
  """It outlives its start, is started once, and saves when stopped."""
  write(tmp_path, TPU_VM)
  shutil.copytree(ROOT / 'scripts', tmp_path / 'source' / 'scripts')
  stand_in(
    tmp_path / 'source/.venv/bin/python',
    f'exec {sys.executable} -c {shlex.quote(SAVES)}',
  )
  assert on_host(tmp_path, 'train') == ''
  give_up = time.monotonic() + 20
  while not on_host(tmp_path, 'state').endswith(': running: ready\n'):
    assert time.monotonic() < give_up
  assert on_host(tmp_path, 'train') == 'training already\n'
  on_host(tmp_path, 'stop')
  assert on_host(tmp_path, 'state').endswith('exit code 75: ends\n')
  assert (tmp_path / 'train.log').read_text().count('ready') == 1


def test_a_request_that_fails(cloud, tmp_path, capfd):
  stand_in(
    tmp_path / 'bin' / 'gcloud',
    'case "$*" in *describe*) [ ! -e "$NOTES/made" ] || echo FAILED ;;\n'
    '*create*) touch "$NOTES/made" ;; esac\n',
  )
  out = tmp_path / 'out'
  assert launch.main([*TPU_VM, f'--out={out}', '--run']) == 1
  error = capfd.readouterr().err
  assert 'error: FAILED' in error
  assert (
    error.splitlines()[-1] == f'error: bash {out}/slice.sh create: exit code 1.'
  )


HOST = {
  'WORKDIR': '/tmp/no',
  'WORKDIR_MOUNT': '',
  'DATA_DIR': '',
  'DATA_DISK': '',
  'HOSTS': '4',
  'SPOT': 'no',
}


@pytest.mark.parametrize(
  'settings, expected',
  [
    ({}, 'is a folder of this host alone, and 4 hosts have to share it'),
    ({'HOSTS': '1', 'SPOT': 'yes'}, 'lies on the boot disk'),
    ({'WORKDIR': '/proc/no/run'}, '/proc/no/run cannot be made'),
    ({'HOSTS': '1', 'DATA_DIR': '/no/data'}, '/no/data is not there'),
    (
      {'HOSTS': '1', 'DATA_DIR': '/no/data', 'DATA_DISK': 'd'},
      'd is not attached',
    ),
  ],
)
def test_a_host_that_does_not_fit(settings, expected, cloud, tmp_path):
  stand_in(tmp_path / 'bin' / 'stat', 'echo 1\n')
  stand_in(tmp_path / 'bin' / 'lsblk', 'echo "/dev/sda1 ext4 /"\n')
  prepared = subprocess.run(
    ['bash', 'scripts/launch/prepare_host.sh'],
    env={**os.environ, **HOST, 'WORKDIR': str(tmp_path / 'run'), **settings},
    capture_output=True,
    text=True,
    check=False,
  )
  assert prepared.returncode == 1
  (error,) = [
    line for line in prepared.stderr.splitlines() if 'warning' not in line
  ]
  assert error.startswith('error: ') and expected in error


def test_a_host_with_an_old_python(cloud, tmp_path):
  """It gets another one: the images of TPU VMs have Python 3.10."""
  stand_in(
    tmp_path / 'bin' / 'python3',
    'echo "$@" >>"$NOTES/old"\n'
    'case "$*" in -c*) exit 1 ;; *find*) echo "$NOTES/python3.11" ;; esac\n',
  )
  stand_in(cloud / 'python3.11', PYTHON)
  repository = tmp_path / 'repository'
  shutil.copytree(ROOT / 'scripts', repository / 'scripts')
  (repository / 'requirements-tpu.txt').touch()
  subprocess.run(
    ['bash', 'scripts/launch/prepare_host.sh'],
    cwd=repository,
    env={**os.environ, **HOST, 'WORKDIR': str(tmp_path / 'run')},
    check=True,
    capture_output=True,
  )
  assert '-m uv python install --quiet 3.11' in (cloud / 'old').read_text()
  assert (cloud / 'pip').read_text().endswith('-r requirements-tpu.txt\n')


@pytest.mark.parametrize(
  'arguments, calls_of',
  [
    (
      SKY,
      'sky jobs launch --yes --detach-run --env REVISION=0123 {}/sky.yaml',
    ),
    (
      (*SKY, '--source=https://example.org/bn#v1'),
      'sky jobs launch --yes --detach-run {}/sky.yaml',
    ),
    (
      (*SLURM, '--sbatch=--comment=a b', '--sbatch=--qos=c'),
      'sbatch --comment=a b --qos=c {}/job.sh',
    ),
  ],
)
def test_run_submits(arguments, calls_of, cloud, tmp_path):
  stand_in(tmp_path / 'bin' / 'git', 'echo 0123\n')
  for name in ('sky', 'sbatch'):
    stand_in(tmp_path / 'bin' / name, f'echo {name} "$@" >>"$NOTES/submitted"')
  out = tmp_path / 'o ut'
  assert launch.main([*arguments, f'--out={out}', '--run']) == 0
  assert (cloud / 'submitted').read_text() == calls_of.format(out) + '\n'


def test_sky_task_runs(cloud, tmp_path):
  """Its commands, done for real in a repository of stand-ins."""
  task = sky_task(
    tmp_path / 'out',
    f'--config.data.data_dir={AWKWARD}',
    '--config.init_from=a\n  b',
  )
  repository = tmp_path / 'repository'
  shutil.copytree(ROOT / 'scripts', repository / 'scripts')
  (repository / 'requirements-tpu.txt').touch()
  (cloud / 'ends').write_text('75\n3\n')
  data = tmp_path / 'data'
  data.mkdir()
  envs = {
    'WORKDIR': str(tmp_path / 'run'),
    'DATA_DIR': str(data),
    'REVISION': '0123',
  }
  codes = [
    subprocess.run(
      ['bash', '-c', task[step]],
      cwd=repository,
      env={**os.environ, **task['envs'], **envs},
      check=False,
    ).returncode
    for step in ('setup', 'run')
  ]
  assert codes == [0, 3]
  assert (repository / 'REVISION').read_text() == '0123\n'
  text = (cloud / 'arguments').read_bytes().split(b'\0\n')[:-1]
  assert [run.decode().split('\0') for run in text] == [
    [
      '-m',
      'bn_repro.main',
      '--config=configs/bn_x30.py',
      '--workdir=/mnt/runs/bn_x30',
      DATA,
      f'--config.data.data_dir={AWKWARD}',
      '--config.init_from=a\n  b',
    ]
  ] * 2


# Mistakes.

DIGITS = ('--config=configs/bn_x30.py:mini', '--config.batch_size=128')


def without(prefix, arguments):
  return tuple(a for a in arguments if not a.startswith(prefix))


@pytest.mark.parametrize(
  'arguments',
  [
    (*without('--shared_workdir', TPU_VM), '--topology=v5e:2x4'),
    (*without('--shared_workdir', SKY), '--workdir_mount=10.0.0.2:/runs'),
    (*without(DATA, TPU_VM), *DIGITS),
    without(DATA, SLURM),
  ],
)
def test_no_mistakes(arguments, tmp_path):
  assert write(tmp_path / 'out', arguments)


@pytest.mark.parametrize(
  'arguments, expected',
  [
    ((*TPU_VM, '--topology=v5e:3x3'), 'There are v5e:1x1, v5e:2x2'),
    ((*SKY, '--topology=v9:2x2'), 'no such TPU'),
    ((*TPU_VM, '--config.batch_size=40'), 'not a multiple of the 16 devices'),
    (
      (*SLURM, '--nodes=3', '--gpus=8', '--config.batch_size=32'),
      'not a multiple of the 24 devices. Use one that is, such as 48, or',
    ),
    ((*TPU_VM, '--config.model.dtype=float64'), 'TPUs have none'),
    ((*SLURM, '--config.model.dtype=float64'), 'GPUs are slow'),
    ((*TPU_VM, '--config.optim.rate=1'), "Did you mean 'optim."),
    ((*TPU_VM, '--config=configs/no.py'), 'no such file'),
    ((*TPU_VM, '--config=/etc/hostname'), ''),
    ((*TPU_VM, '--name=Bn'), '--name=Bn: give'),
    ((*TPU_VM, '--name=bn-'), '--name=bn-: give'),
    ((*TPU_VM, '--name=../bn'), '--name=../bn: give'),
    ((*SLURM, '--name=a\nb'), 'lower-case letters'),
    ((*TPU_VM, '--workdir=runs/bn'), 'an absolute path on the hosts'),
    ((*TPU_VM, '--workdir=gs://runs/bn'), 'an absolute path on the hosts'),
    ((*TPU_VM, '--workdir=/runs'), 'an absolute path on the hosts'),
    ((*SLURM, '--config.data.data_dir=data'), 'an absolute path on the hosts'),
    (without(DATA, TPU_VM), '--config.data.data_dir: say where'),
    (without(DATA, SKY), '--config.data.data_dir: say where'),
    (
      (*without(DATA, SKY), *DIGITS, '--data_bucket=gs://b'),
      '--config.data.data_dir: say where',
    ),
    (
      without('--shared_workdir', TPU_VM),
      'which 4 hosts share. Give --workdir',
    ),
    (
      (*without('--shared_workdir', TPU_VM), '--topology=v5e:2x4', '--spot'),
      'which a spot slice must not lose. Give --workdir_mount=SERVER:/SHARE',
    ),
    (
      (*without('--shared_workdir', SKY), '--topology=v5e:2x4'),
      'which a spot slice must not lose',
    ),
    ((*TPU_VM, '--project='), '--project: must not be empty'),
    ((*TPU_VM, '--zone='), '--zone: must not be empty'),
    ((*SKY, '--data_bucket=b'), "'b' is not gs://BUCKET"),
    ((*SKY, '--source=https://a.b/c'), 'is not URL#REVISION'),
    ((*SKY, '--workdir_mount=runs'), 'is not SERVER:/SHARE'),
    ((*SLURM, '--gpus=0'), "'0' is not a whole number of at least 1"),
    ((*SLURM, '--topology=v5e:4x4'), 'unrecognized arguments'),
    (without('--workdir=', TPU_VM), 'required: --workdir'),
    (('vm', *TPU_VM[1:]), 'invalid choice'),
    ((), 'required: PLACE'),
    ((*TPU_VM, '--run'), 'gcloud: not found'),
    ((*SKY, '--run'), 'sky: not found'),
    ((*SLURM, '--run'), 'sbatch: not found'),
  ],
)
def test_mistakes(arguments, expected, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('PATH', str(tmp_path))
  default = ROOT / 'launch'
  before = default.exists()
  out = tmp_path / 'out'
  assert (
    launch.main([*arguments, *([f'--out={out}'] if arguments else [])]) == 1
  )
  said = capsys.readouterr()
  (line,) = (
    said.err.splitlines() if '\n' not in ''.join(arguments) else [said.err]
  )
  assert line.startswith('error: ') and expected in line
  assert said.out == ''
  assert not out.exists() and default.exists() == before


def test_no_credentials(cloud, tmp_path, capsys):
  (cloud / 'credentials').unlink()
  out = tmp_path / 'out'
  assert launch.main([*TPU_VM, f'--out={out}', '--run']) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line == (
    'error: gcloud has no credentials (ERROR: no account). Use gcloud init.'
  )
  assert not out.exists()
  assert calls(cloud) == ['auth print-access-token']


def test_a_config_from_elsewhere(tmp_path, capsys):
  shutil.copy('configs/bn_x30.py', tmp_path)
  arguments = [*TPU_VM, f'--config={tmp_path}/bn_x30.py']
  assert launch.main([*arguments, f'--out={tmp_path}/out']) == 1
  assert 'lies outside of the repository' in capsys.readouterr().err


def test_another_launch_is_left_alone(tmp_path, capsys):
  out = tmp_path / 'out'
  before = write(out, TPU_VM)
  assert write(out, TPU_VM) == before
  for arguments in ((*TPU_VM, '--spot'), SKY, SLURM):
    assert launch.main([*arguments, f'--out={out}']) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert 'is of another launch' in line
  assert {p.name: p.read_text() for p in out.iterdir()} == before
  (out / 'slice.sh').write_bytes(b'\xff\0')
  assert launch.main([*TPU_VM, f'--out={out}']) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert 'its slice.sh is of another launch' in line


def test_a_folder_that_cannot_be_written(capsys):
  assert launch.main([*TPU_VM, '--out=/proc/no/out']) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and '/proc/no' in line


# Help.


@pytest.mark.parametrize('place', [None, *launch._EXAMPLES])
def test_help(place):
  """In less than a second of a processor, and without JAX."""
  arguments = [place] if place else []
  program = (
    'import sys; sys.path.insert(0, "scripts"); import launch\n'
    f'try: launch.main([*{arguments}, "--help"])\n'
    'finally: assert not {"jax", "numpy"} & set(sys.modules)'
  )
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  said = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=False
  )
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  seconds = sum(after[:2]) - sum(before[:2])
  assert said.returncode == 0, said.stderr
  for name in [place] if place else launch._EXAMPLES:
    assert f'python scripts/launch.py {name} --name=bn-x30' in said.stdout
  assert seconds < 1


if __name__ == '__main__':
  os.chdir(ROOT)
  for each in launch._EXAMPLES:
    shutil.rmtree(GOLDEN / each, ignore_errors=True)
    write(GOLDEN / each, example(each))
