"""Commands in processes of their own, and what their runs write.

A test waits for a line of output or for the end of a process, never for a time.
"""

from importlib import metadata
import json
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import threading
import types

import numpy as np
import orbax.checkpoint as ocp
from packaging.version import Version
from stand_ins import TIMEOUT

from bn_repro.training import model_file

ROOT = Path(__file__).resolve().parent.parent

TRAIN = ('-m', 'bn_repro.main')

# The network of two Inception modules, which compiles in seconds.
TINY = '--config.model.name=inception_tiny'

# Further arguments of the MNIST networks, which compile in a second, for what
# does not depend on the network.
MNIST = (
  '--config.total_steps=600',
  '--config.steps_per_call=1',
  '--config.log_every=70',
  '--config.eval_every=200',
  '--config.checkpoint_every=100',
  '--config.bn.population_batches=4',
  '--config.data.distorted_copies=0',
  '--config.data.shuffle=within_shard',
  '--config.data.num_shards=20',
)

# Compiles in two thirds of the time, to programs as fast as by default. (LLVM
# optimizes, unlike in the tests themselves: here hundreds of steps are taken.)
QUICK_COMPILATION = '--xla_cpu_parallel_codegen_split_count=1'
# XLA ends a process whose flags it does not know, and later versions have no
# other emitters.
if Version(metadata.version('jaxlib')) < Version('0.11'):
  QUICK_COMPILATION += ' --xla_cpu_use_fusion_emitters=false'


def environment(*, devices=1, **changes):
  """The environment of a command: CPU devices of its own number.

  Args:
    devices: number of fake CPU devices; the tests themselves have eight.
    changes: further variables.
  """
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(ROOT),
    'PYTHONUNBUFFERED': '1',
    # As in `pyproject.toml`, where the reason is.
    'PYTHONWARNINGS': 'ignore:Error reading persistent compilation cache entry',
    'XLA_FLAGS': (
      f'{QUICK_COMPILATION} --xla_force_host_platform_device_count={devices}'
    ),
    **changes,
  }


def start(*arguments, program=TRAIN, devices=1, **changes):
  """Starts a Python program in the repository, in a process group of its own.

  Args:
    arguments: of the program.
    program: arguments of Python that name the program.
    devices: number of CPU devices.
    changes: to the environment.
  """
  return subprocess.Popen(
    [sys.executable, *program, *arguments],
    cwd=ROOT,
    env=environment(devices=devices, **changes),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def kill(process):
  """Kills a process that still runs, and those that it started."""
  if process.poll() is None:
    os.killpg(process.pid, signal.SIGKILL)


def wait_for_line(process, text):
  """Reads standard output up to a line that contains the text."""
  timer = threading.Timer(TIMEOUT, kill, [process])
  timer.start()
  try:
    for line in process.stdout:
      if text in line:
        return
  finally:
    timer.cancel()
  raise AssertionError(
    f'ended before it printed {text!r}: {process.stderr.read()}'
  )


def finish(*processes, timeout=TIMEOUT):
  """Waits for processes; a CompletedProcess for each. None is left running."""
  try:
    outputs = [process.communicate(timeout=timeout) for process in processes]
  finally:
    for process in processes:
      kill(process)
  return [
    subprocess.CompletedProcess(process.args, process.returncode, *output)
    for process, output in zip(processes, outputs, strict=True)
  ]


def run(*arguments, **options):
  """Starts a program and waits for its end; a CompletedProcess."""
  return finish(start(*arguments, **options))[0]


# Runs `main` with each list of arguments; prints the exit code, output and
# errors of each, and whether JAX was imported.
_WITHOUT_JAX = """
import contextlib, io, json, sys
from bn_repro import main
results = []
for arguments in json.loads(sys.argv[1]):
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      code = main.main(arguments)
    except SystemExit as end:
      code = end.code
  results.append({
    'code': code, 'out': out.getvalue(), 'err': err.getvalue(),
    'imported_jax': 'jax' in sys.modules,
  })
print(json.dumps(results))
"""


def run_without_jax(*commands):
  """Runs `main` several times in one process; no command may import JAX.

  Yields:
    Of each command the `code`, and its output `out` and errors `err`.
  """
  process = run(json.dumps(commands), program=('-c', _WITHOUT_JAX))
  assert process.returncode == 0, process.stderr
  results = json.loads(process.stdout)
  assert len(results) == len(commands)
  for result, command in zip(results, commands, strict=True):
    assert not result['imported_jax'], command
    yield types.SimpleNamespace(**result)


def free_port():
  """A port of the loopback interface that nobody uses."""
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def status(workdir):
  """Status, step and reason: what does not depend on the clock."""
  content = json.loads((workdir / 'status.json').read_text())
  return {name: content[name] for name in ('status', 'step', 'reason')}


def metrics(workdir):
  """The lines of `metrics.jsonl`, without what depends on the clock."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [
    {key: value for key, value in json.loads(line).items() if key != 'timing'}
    for line in lines
  ]


def newest_arrays(workdir):
  """The step of the newest checkpoint, and its arrays by their paths."""
  manager = ocp.CheckpointManager((workdir / 'checkpoints').absolute())
  step = manager.latest_step()
  restored = manager.restore(
    step, args=ocp.args.Composite(state=ocp.args.StandardRestore())
  )
  manager.close()
  return step, _by_path(restored.state)


def _by_path(tree, path=()):
  if isinstance(tree, dict):
    return {
      name: leaf
      for key, value in tree.items()
      for name, leaf in _by_path(value, (*path, key)).items()
    }
  if isinstance(tree, list | tuple):
    return _by_path(dict(enumerate(tree)), path)
  return {} if tree is None else {path: np.asarray(tree)}


def assert_same_arrays(workdir, reference):
  """The newest checkpoints are equal, bit for bit."""
  step, found = newest_arrays(workdir)
  expected_step, expected = newest_arrays(reference)
  assert step == expected_step
  assert found.keys() == expected.keys()
  assert {path[0] for path in found} >= {'params', 'opt_state', 'step', 'seed'}
  for path, array in expected.items():
    np.testing.assert_array_equal(found[path], array, err_msg=str(path))


def assert_same_run(workdir, reference):
  """Metrics, status, the newest checkpoint and the model are equal."""
  assert metrics(workdir) == metrics(reference)
  found, expected = (
    model_file.read(folder / model_file.NAME) for folder in (workdir, reference)
  )
  assert found.digest == expected.digest
  assert found.facts['evaluation'] == expected.facts['evaluation']
  assert status(workdir) == status(reference)
  assert_same_arrays(workdir, reference)
