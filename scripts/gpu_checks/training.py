"""Runs of `bn_repro.main` on the device, in processes of their own."""

from collections.abc import Sequence
import math
import os
from pathlib import Path
import shutil
import signal
import statistics
import subprocess
import sys
from typing import Any

import fault_injection

from bn_repro import paper
from bn_repro.runtime import workdir as workdir_lib
from gpu_checks.outcomes import ROOT, Figure, Settings

# With this flag XLA promises that a program gives the same bits each time.
DETERMINISTIC = '--xla_gpu_deterministic_ops=true'

# The sweeps whose trials are all variants, and the seed that is trained.
SWEEPS = {'mnist_5k': paper.FIG_3, 'fig1': paper.FIG_1}
_SEED = 0
_QUICK_SWEEPS = {'fig1': ('bn_mnist',)}


def _fields(settings: Settings, steps: int, *overrides: str) -> list[str]:
  """The flags of a run of so many steps, and of one evaluation."""
  fields = (
    *settings.overrides,
    f'total_steps={steps}',
    f'eval_every={steps}',
    f'checkpoint_every={steps}',
    *overrides,
  )
  return [f'--config.{field}' for field in fields]


def _command(
  settings: Settings, workdir: Path, steps: int, *overrides: str
) -> list[str]:
  """The command that trains BN-x5 for some steps."""
  return [
    *(sys.executable, '-m', 'bn_repro.main'),
    f'--config={settings.config("bn_x5:mini")}',
    f'--workdir={workdir}',
    *_fields(settings, steps, *overrides),
  ]


def _run(command: Sequence[str], **environment: str) -> None:
  """Runs a command of the package.

  Raises:
    RuntimeError: if it fails.
  """
  environment = {**os.environ, **environment}
  process = subprocess.run(command, cwd=ROOT, env=environment, check=False)
  if process.returncode:
    raise RuntimeError(
      f'{command[2]}: exit code {process.returncode}, see the log'
    )


def _empty(folder: Path) -> Path:
  """Returns a folder, without what an interrupted check left in it."""
  shutil.rmtree(folder, ignore_errors=True)
  return folder


def bfloat16(settings: Settings) -> list[Figure]:
  """Compares training in bfloat16 with training in float32.

  The bound is the range over the five seeds of `results/mnist_5k`: the number
  format may change a loss as another seed does.
  """
  steps = 40 if settings.quick else 200
  folder = _empty(settings.runs('bfloat16'))
  losses = {}
  for dtype in ('float32', 'bfloat16'):
    workdir = folder / dtype
    _run(_command(settings, workdir, steps, f'model.dtype={dtype}'))
    losses[dtype] = _training_losses(workdir, steps)
  of_seeds = [
    _training_losses(path, steps)
    for path in (ROOT / 'results/mnist_5k').glob('bn_x5_seed*')
  ]
  ranges = [
    max(at_step) - min(at_step) for at_step in zip(*of_seeds, strict=True)
  ]
  differences = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
  return [
    Figure(
      f'difference of the losses of {steps} steps, mean of {len(ranges)}',
      statistics.fmean(differences),
      at_most=statistics.fmean(ranges),
    )
  ]


def _training_losses(run: Path, last: int) -> list[float]:
  """The losses of a run in its lines of training up to a step."""
  return [
    line['loss']
    for line in workdir_lib.read_metrics(run / 'metrics.jsonl')
    if line['split'] == 'train' and line['step'] <= last
  ]


def determinism(settings: Settings) -> list[Figure]:
  """Compares runs of one command: with the switch, stopped, and without it."""
  steps = 600 if settings.quick else 200
  folder = _empty(settings.runs('determinism'))
  flags = f'{os.environ.get("XLA_FLAGS", "")} {DETERMINISTIC}'.strip()

  def command(name: str) -> list[str]:
    return _command(settings, folder / name, steps)

  for name in ('first', 'second'):
    _run(command(name), XLA_FLAGS=flags)
  _stop_at_first_line(command('stopped'), XLA_FLAGS=flags)
  _run(command('stopped'), XLA_FLAGS=flags)
  for name in ('without', 'again'):
    _run(command(name))
  results = {path.name: _result(path) for path in folder.iterdir()}

  def compare(what: str, one: str, other: str, bound: int | None) -> Figure:
    a, b = results[one], results[other]
    differing = [part for part in a if a[part] != b[part]]
    return Figure(
      f'{what}: results that differ',
      len(differing),
      at_most=bound,
      note=', '.join(differing),
    )

  return [
    compare(f'two runs with {DETERMINISTIC}', 'first', 'second', 0),
    compare(
      'such a run, stopped by SIGTERM and resumed', 'first', 'stopped', 0
    ),
    compare('two runs without it', 'without', 'again', None),
  ]


def _result(run: Path) -> dict[str, Any]:
  """What a run has computed, by the file that holds it."""
  metrics, checkpoint, (model, _), status = fault_injection.result_of_run(run)
  return {
    'metrics': metrics,
    'checkpoint': checkpoint,
    'model': model,
    'status': status,
  }


def _stop_at_first_line(command: Sequence[str], **environment: str) -> None:
  """Sends SIGTERM to a run after its first line of metrics.

  Raises:
    RuntimeError: if it does not save and exit with 75.
  """
  with subprocess.Popen(
    command,
    cwd=ROOT,
    env={**os.environ, 'PYTHONUNBUFFERED': '1', **environment},
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout is not None
    is_stopped = False
    for line in process.stdout:
      print(line, end='')
      if line.startswith('step ') and not is_stopped:
        process.send_signal(signal.SIGTERM)
        is_stopped = True
  expected = workdir_lib.EXIT_CODES[workdir_lib.Status.PREEMPTED]
  if process.returncode != expected:
    raise RuntimeError(
      f'a run ended with {process.returncode} after SIGTERM, not {expected}'
    )


def variants(settings: Settings) -> list[Figure]:
  """Trains every variant to its end, and compares accuracies with the CPU's.

  A sixth run is outside the range of five others in a third of all cases, so
  the bounds are the range widened by its own length on both sides.
  """
  figures = []
  for sweep, names in (_QUICK_SWEEPS if settings.quick else SWEEPS).items():
    folder = settings.runs(sweep)
    _run(
      [
        *(sys.executable, '-m', 'bn_repro.sweep', f'--sweep={sweep}'),
        f'--workdir={folder}',
        '--jobs=1',
        f'--sweep.seed={_SEED}',
        f'--sweep.variant={",".join(names)}',
        *(_fields(settings, 100) if settings.quick else ()),
      ]
    )
    for name in names:
      accuracies = [
        _final_accuracy(path)
        for path in (ROOT / 'results' / sweep).glob(f'{name}_seed*')
      ]
      low, high = min(accuracies), max(accuracies)
      is_published = not settings.quick
      figures.append(
        Figure(
          f'{name}: final accuracy on test images',
          _final_accuracy(folder / f'{name}_seed{_SEED}'),
          at_least=2 * low - high if is_published else None,
          at_most=2 * high - low if is_published else None,
          note=f'on CPU, {len(accuracies)} seeds: {low:.3g} to {high:.3g}',
        )
      )
  return figures


def _final_accuracy(run: Path) -> float:
  """The last accuracy on test images; NaN if a run diverged before one."""
  accuracies = [
    line['accuracy']
    for line in workdir_lib.read_metrics(run / 'metrics.jsonl')
    if line['split'] == 'test'
  ]
  return accuracies[-1] if accuracies else math.nan


def trace(settings: Settings) -> list[Figure]:
  """Traces five steps, and looks for the layers of the network in the trace."""
  from bn_repro.training import model_file

  workdir = _empty(settings.runs('trace'))
  fields = ('profile_steps=5', 'profile_first_step=20')
  _run(_command(settings, workdir, 40, *fields))
  content = b''.join(
    path.read_bytes() for path in (workdir / 'profile').rglob('*.xplane.pb')
  )
  layers = model_file.read(workdir / model_file.NAME).variables['params']
  named = sum(f'{layer}/'.encode() in content for layer in layers)
  return [
    Figure('size of the trace', len(content) / 1e6, 'MB'),
    Figure(
      f'layers that it names, of {len(layers)}',
      named,
      at_least=len(layers) / 2,  # XLA may merge some.
    ),
  ]
