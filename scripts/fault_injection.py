"""Damages and kills runs at random, and checks that nothing is lost or wrong.

  python scripts/fault_injection.py --minutes=30

There are two kinds of trial. Every fourth trial is a kill:

damage  A file of a copied workdir gets a flipped bit, loses its end, or is
        deleted. Then a command reads the workdir: resume, warm start, evaluate,
        predict, export or report. Its output must equal that of the undamaged
        workdir, or the damage must be reported: by an error of one line, or, in
        the report, by a warning about the run that is left out.
kill    A run, or a sweep, is killed at random instants and started again until
        it is done. Its result must equal that of one that was never killed.

Failed trials are printed with their number; --trial repeats one.

Exit codes:
  0  every trial is as it should be
  1  one is not, or the command is invalid
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import contextlib
import json
import os
from pathlib import Path
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bn_repro import cli
from bn_repro.errors import UserError
from bn_repro.runtime import workdir as workdir_lib
from bn_repro.runtime.progress import duration

# Fields of runs that train in a second, on generated images.
FIELDS: Mapping[str, Any] = {
  'data.name': 'synthetic',
  'data.image_size': 28,
  'data.distorted_copies': 0,
  'data.holdout': 64,
  'eval_split': 'validation',
  'batch_size': 64,
  'steps_per_call': 1,
  'total_steps': 60,
  'log_every': 6,
  'eval_every': 12,
  'checkpoint_every': 20,
  'bn.population_batches': 3,
}
# Runs to kill: without BN, with BN, and a convolutional network.
CONFIGS: Mapping[str, Sequence[str]] = {
  'mnist:mini': (),
  'bn_mnist:mini': (),
  'bn_x5:mini': (
    '--config.model.name=inception_tiny',
    '--config.data.image_size=32',
  ),
}
SWEEP = f"""
from bn_repro.sweep.sweep import Sweep
from configs.sweeps import lr_multipliers


def get_sweep(mode):
  return Sweep(
    axes={{'variant': ('bn_mnist',), 'multiplier': (1, 2), 'seed': (0, 1)}},
    trial=lr_multipliers.trial,
    x='multiplier',
    repeat='seed',
    defaults={dict(FIELDS)!r},
  )
"""
# Longest time that a command may take, in seconds.
TIMEOUT = 600
# Kills of one run. Afterwards it is left alone, or it would never be done.
MAX_KILLS = 8
# Lines of standard error that are ours; XLA and Gloo write others.
OWN_LINES = ('error: ', 'warning: ', 'Traceback')


class Failure(Exception):
  """A trial that is not as it should be."""


def start(*arguments: str, program: str = 'main') -> subprocess.Popen[str]:
  """Starts a command of the package in a process group of its own."""
  return subprocess.Popen(
    [sys.executable, '-m', f'bn_repro.{program}', *arguments],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
  """Waits for a command; returns its exit code, its output and its errors."""
  out, err = process.communicate(timeout=TIMEOUT)
  lines = err.splitlines(keepends=True)
  return (
    process.returncode,
    out,
    ''.join(line for line in lines if line.startswith(OWN_LINES)),
  )


def succeed(*arguments: str, program: str = 'main') -> str:
  """Runs a command that has to succeed; returns its standard output.

  Raises:
    Failure: if it does not.
  """
  code, out, err = finish(start(*arguments, program=program))
  if code:
    raise Failure(f'{program} {arguments}: exit code {code}: {err}')
  return out


def wait_until_connected(first: subprocess.Popen[str], workdir: Path) -> None:
  """Waits until process 0 locks the workdir, which it does once connected.

  Before that, the loss of a process cannot be told from a wrong address.
  """
  holder = f'process {first.pid} '
  lock = workdir / 'lock'
  while first.poll() is None:
    if lock.is_file() and lock.read_text().startswith(holder):
      return
    time.sleep(0.05)


def result_of_run(workdir: Path) -> Any:
  """What a run has computed: metrics, last state, model, and status."""
  lines = [
    {name: x for name, x in json.loads(line).items() if name != 'timing'}
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]
  newest = max(int(path.name) for path in (workdir / 'checkpoints').iterdir())
  meta = workdir / 'checkpoints' / str(newest) / 'meta' / 'metadata'
  status = json.loads((workdir / 'status.json').read_text())
  return (
    lines,
    json.loads(meta.read_text())['checksums'],
    result_of_model(workdir / 'model.safetensors'),
    {name: status[name] for name in ('status', 'step', 'reason')},
  )


def result_of_model(path: Path) -> Any:
  """The digest and the facts of a model file, without its config.

  A config can name another workdir, which differs between trials.
  """
  content = path.read_bytes()
  length = int.from_bytes(content[:8], 'little')
  header = json.loads(content[8 : 8 + length])['__metadata__']
  found = json.loads(header['bn_repro'])
  return found['digest'], found['facts']


def result_of_sweep(workdir: Path) -> Any:
  """What a sweep has computed: its table and its runs."""
  return (
    (workdir / 'trials.csv').read_text(),
    [result_of_run(path.parent) for path in sorted(workdir.glob('*/run.json'))],
  )


def damage(workdir: Path, rng: random.Random) -> str:
  """Damages a file of a workdir; returns what was done to which file."""
  files = sorted(
    path
    for path in workdir.rglob('*')
    if path.is_file() and path.name != 'lock'
  )
  # Half of the time it is one of the files beside the checkpoints.
  beside = [path for path in files if path.parent == workdir]
  path = rng.choice(rng.choice((files, beside)))
  content = bytearray(path.read_bytes())
  name = path.relative_to(workdir)
  kind = rng.choice(('flip', 'flip', 'truncation', 'deletion'))
  if kind == 'deletion' or not content:
    path.unlink()
    return f'deletion of {name}'
  if kind == 'truncation':
    length = rng.randrange(len(content))
    path.write_bytes(content[:length])
    return f'truncation of {name} to {length} bytes'
  position, bit = rng.randrange(len(content)), rng.randrange(8)
  content[position] ^= 1 << bit
  path.write_bytes(content)
  return f'flip of bit {bit} of byte {position} of {name}'


class Damages:
  """Trials of damage, which start from copies of two reference runs."""

  def __init__(self, folder: Path):
    """Trains the reference runs in an empty folder."""
    self._folder = folder
    self._train = run_command('bn_mnist:mini')
    self._done, self._other = (
      folder / 'runs' / 'done',
      folder / 'runs' / 'other',
    )
    succeed(*self._train, f'--workdir={self._done}')
    succeed(*run_command('mnist:mini'), f'--workdir={self._other}')
    # As if it had been killed before its last save.
    self._stopped = folder / 'stopped'
    shutil.copytree(self._done, self._stopped)
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    self._image = folder / 'image.png'
    Image.fromarray(pixels).save(self._image)
    last = FIELDS['total_steps']
    shutil.rmtree(self._stopped / 'checkpoints' / str(last))
    stopped = workdir_lib.Workdir(self._stopped)
    stopped.write_status(workdir_lib.Status.RUNNING, 0, 'in progress')
    self._roads: Mapping[str, Callable[[Path], tuple[int, Any, str]]] = {
      'resume': self._resume,
      'warm start': self._warm_start,
      'evaluate': self._evaluate,
      'predict': self._predict,
      'export': self._export,
      'report': self._report,
    }
    self._expected = {
      road: self._on_copy(road, lambda workdir: '')[1] for road in self._roads
    }
    # The page without the run that trials damage.
    self._without = self._report(folder / 'nowhere')

  def trial(self, rng: random.Random) -> tuple[str, str]:
    """Damages a copy and reads it; returns what was done and the outcome.

    Raises:
      Failure: if damage is neither harmless nor reported.
    """
    road = rng.choice(list(self._roads))
    done = ''

    def damaged(workdir: Path) -> None:
      nonlocal done
      done = damage(workdir, rng)

    code, output, errors = self._on_copy(road, damaged)
    what = f'{road} after {done}'
    if code == 0 and output == self._expected[road]:
      return what, 'recovered' if errors else 'harmless'
    is_left_out = (
      road == 'report'
      and code == 0
      and output == self._without[1]
      and 'done' in errors
    )
    one_line = errors.count('\n') == 1 and 'Traceback' not in errors
    if is_left_out or (code == 1 and one_line):
      return what, 'reported'
    raise Failure(
      f'{what}: exit code {code}, '
      f'{"other" if output != self._expected[road] else "same"} output, '
      f'errors: {errors or "none"}'
    )

  def _on_copy(
    self, road: str, change: Callable[[Path], Any]
  ) -> tuple[int, Any, str]:
    """Reads a changed copy of a workdir; returns code, output and errors."""
    source = self._stopped if road == 'resume' else self._done
    with tempfile.TemporaryDirectory(dir=self._folder) as folder:
      copy = Path(folder, 'runs', source.name)
      shutil.copytree(source, copy)
      change(copy)
      return self._roads[road](copy)

  def _resume(self, workdir: Path) -> tuple[int, Any, str]:
    code, _, errors = finish(start(*self._train, f'--workdir={workdir}'))
    return code, None if code else result_of_run(workdir), errors

  def _warm_start(self, workdir: Path) -> tuple[int, Any, str]:
    warm = workdir.with_name('warm')
    code, _, errors = finish(
      start(
        *self._train,
        f'--workdir={warm}',
        f'--config.init_from={workdir}',
        '--config.total_steps=6',
      )
    )
    return code, None if code else result_of_run(warm), errors

  def _evaluate(self, workdir: Path) -> tuple[int, Any, str]:
    return finish(start(f'--workdir={workdir}', program='evaluate'))

  def _predict(self, workdir: Path) -> tuple[int, Any, str]:
    table = workdir.with_name('table.csv')
    code, _, errors = finish(
      start(
        f'--model={workdir}',
        f'--csv={table}',
        str(self._image),
        program='predict',
      )
    )
    return code, None if code else table.read_text(), errors

  def _export(self, workdir: Path) -> tuple[int, Any, str]:
    out = workdir.with_name('exported')
    code, _, errors = finish(
      start(
        f'--model={workdir}',
        '--format=safetensors',
        f'--out={out}',
        program='export',
      )
    )
    return code, None if code else out.read_bytes(), errors

  def _report(self, workdir: Path) -> tuple[int, Any, str]:
    """The ledger and the rows of the tables; warnings stand below them."""
    with tempfile.TemporaryDirectory(dir=self._folder) as folder:
      runs, out = Path(folder, 'runs'), Path(folder, 'out')
      shutil.copytree(self._other, runs / 'other')
      if workdir.exists():
        shutil.copytree(workdir, runs / 'done')
      code, _, errors = finish(
        start(f'--runs={runs}', f'--out={out}', program='report')
      )
      if code:
        return code, None, errors
      page = (out / 'index.html').read_text()
      page = re.split('\\s*(<p class="fails">|</body>)', page)[0]
      return code, (page, (out / 'ledger.md').read_text()), errors


class Kills:
  """Trials of kills."""

  def __init__(self, folder: Path):
    """Creates the trials, which use an empty folder."""
    self._folder = folder
    self._sweep = folder / 'sweep.py'
    self._sweep.write_text(SWEEP)
    # The result of each run that was never killed, and its seconds.
    self._references: dict[str, tuple[Any, float]] = {}
    self.num_kills = 0

  def _reference(self, name: str) -> tuple[Any, float]:
    """Returns the result and the seconds of a run that is never killed."""
    if name not in self._references:
      workdir, started = self._folder / name, time.monotonic()
      self._run(name, workdir, lambda: None)
      seconds = time.monotonic() - started
      self._references[name] = self._result(name, workdir), seconds
    return self._references[name]

  def trial(self, rng: random.Random) -> tuple[str, str]:
    """Kills a run until it is done; returns what was done and the outcome.

    Raises:
      Failure: if its result differs, or a process ends in another way.
    """
    runs = (*CONFIGS, *(f'2 x {name}' for name in CONFIGS), 'sweep')
    name = rng.choice(runs)
    expected, seconds = self._reference(name)
    kills = 0

    def next_kill() -> tuple[float, int] | None:
      nonlocal kills
      if kills == MAX_KILLS:
        return None
      kills += 1
      return rng.uniform(0, 1.2 * seconds), rng.randrange(2)

    with tempfile.TemporaryDirectory(dir=self._folder) as folder:
      workdir = Path(folder, 'run')
      self._run(name, workdir, next_kill)
      if self._result(name, workdir) != expected:
        raise Failure(f'{name}: another result after {kills} kills')
    return f'{name}, killed {kills} times', 'equal'

  def _result(self, name: str, workdir: Path) -> Any:
    return (result_of_sweep if name == 'sweep' else result_of_run)(workdir)

  def _run(
    self,
    name: str,
    workdir: Path,
    next_kill: Callable[[], tuple[float, int] | None],
  ) -> None:
    """Runs a command until it is done.

    Args:
      name: the command.
      workdir: its workdir.
      next_kill: returns the seconds until the next kill, and the process to
        kill; None to leave the command alone.

    Raises:
      Failure: if a process that was not killed fails.
    """
    while True:
      processes = self._start(name, workdir)
      kill = next_kill()
      if kill is not None:
        seconds, index = kill
        victim = processes[index % len(processes)]
        if len(processes) > 1:
          wait_until_connected(processes[0], workdir)
        with contextlib.suppress(subprocess.TimeoutExpired):
          victim.wait(seconds)
        if victim.poll() is None:
          os.killpg(victim.pid, signal.SIGKILL)
          self.num_kills += 1
      ends = [finish(process) for process in processes]
      codes = [code for code, _, _ in ends]
      if set(codes) == {0}:
        return
      # Processes that have lost another one end with 75; JAX aborts those that
      # have lost process 0.
      ends_of_kills = {0, 75, -signal.SIGKILL, -signal.SIGABRT}
      if kill is None or not set(codes) <= ends_of_kills:
        raise Failure(f'{name}: exit codes {codes}: {[e for _, _, e in ends]}')

  def _start(self, name: str, workdir: Path) -> list[subprocess.Popen[str]]:
    if name == 'sweep':
      arguments = (f'--sweep={self._sweep}', f'--workdir={workdir}')
      return [start(*arguments, program='sweep')]
    config = name.removeprefix('2 x ')
    command = (*run_command(config), f'--workdir={workdir}')
    if config == name:
      return [start(*command)]
    with socket.socket() as listener:
      listener.bind(('127.0.0.1', 0))
      port = listener.getsockname()[1]
    return [
      start(
        *command,
        f'--coordinator=127.0.0.1:{port}',
        '--num_processes=2',
        f'--process_id={index}',
      )
      for index in range(2)
    ]


def run_command(config: str) -> tuple[str, ...]:
  """The arguments of `bn_repro.main` for one of `CONFIGS`."""
  fields = tuple(f'--config.{name}={value}' for name, value in FIELDS.items())
  return f'--config={config}', *fields, *CONFIGS[config]


def run_trials(flags: argparse.Namespace, folder: Path) -> int:
  """Runs trials until the time is up; returns the number of failed ones."""
  kinds: dict[str, Damages | Kills] = {}
  outcomes: Counter[tuple[str, str]] = Counter()
  failed = 0
  started = time.monotonic()
  numbers = (
    iter(range(10**9))
    if flags.trial is None
    else iter(range(flags.trial, flags.trial + 1))
  )
  for number in numbers:
    elapsed = time.monotonic() - started
    if flags.trial is None and elapsed > 60 * flags.minutes:
      break
    # Damage takes a single command, a kill about ten.
    kind = 'kill' if number % 4 == 3 else 'damage'
    if kind not in kinds:
      (folder / kind).mkdir()
      kinds[kind] = (Kills if kind == 'kill' else Damages)(folder / kind)
    try:
      what, outcome = kinds[kind].trial(random.Random(f'{flags.seed} {number}'))
    except Failure as error:
      what, outcome = str(error), 'FAILED'
      failed += 1
    outcomes[kind, outcome] += 1
    left = duration(max(60 * flags.minutes - elapsed, 0))
    print(f'trial {number}, {left} left: {what}: {outcome}', flush=True)
  for (kind, outcome), count in sorted(outcomes.items()):
    print(f'{kind}: {count} {outcome}')
  kills = kinds.get('kill')
  if isinstance(kills, Kills):
    print(f'{kills.num_kills} processes killed')
  return failed


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = cli.Parser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--minutes', type=float, default=5, help='time for trials (default: 5)'
  )
  parser.add_argument(
    '--seed', type=int, default=0, help='seed of all trials (default: 0)'
  )
  parser.add_argument(
    '--trial', type=int, metavar='N', help='run only trial N of this seed'
  )
  try:
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix='fault_injection_') as folder:
      return 1 if run_trials(flags, Path(folder)) else 0
  except UserError as error:
    return cli.report_user_error(error)


if __name__ == '__main__':
  sys.exit(main())
