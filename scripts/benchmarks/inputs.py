"""The input pipeline, against tf.data and Pillow."""

from collections.abc import Sequence
import contextlib
import functools
import itertools
from pathlib import Path
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks import input_pipelines, measure, peers
from bn_repro.data import imagenet_metadata
from bn_repro.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent

RATIO = 'ours over tf.data, per CPU-second'
PSNR = 'PSNR of ours'
PSNR_TF_DATA = 'PSNR of tf.data'


def _start(*arguments: str) -> subprocess.Popen[str]:
  """Starts `input_pipelines.py`, with TensorFlow if it needs it."""
  python = sys.executable
  if arguments[0] in ('tf.data', 'tfrecord'):
    python = f'{ROOT}/.venv-prepare/bin/python'
  return peers.start('input_pipelines.py', *arguments, python=python)


def _install_tensorflow() -> None:
  """Creates the environment of `scripts/prepare_imagenet.sh`."""
  command = (
    'source scripts/environment.sh; '
    'use_environment requirements-prepare.txt .venv-prepare'
  )
  if subprocess.run(['bash', '-c', command], cwd=ROOT, check=False).returncode:
    raise UserError(
      'TensorFlow could not be installed into .venv-prepare '
      '(requirements-prepare.txt); the lines above say why'
    )


def rates(rounds: int) -> list[measure.Figure]:
  """Counts images per second, and computes PSNRs.

  Raises:
    UserError: if TensorFlow cannot be installed.
  """
  _install_tensorflow()
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    input_pipelines.write_photographs(Path(folder))
    peers.read_answer(stack.enter_context(_start('tfrecord', folder)))
    pipelines = {
      name: stack.enter_context(_start(name, folder))
      for name in input_pipelines.PIPELINES
    }

    def rate(name: str) -> float:
      answer = peers.ask(pipelines[name], '15')
      return answer['images'] / answer['cpu']

    print('images per second of CPU time')
    results = measure.interleaved(
      {name: functools.partial(rate, name) for name in pipelines}, rounds
    )
    reference = input_pipelines.antialiased_views(Path(folder))
    psnrs = {}
    for name in ('ours', 'tf.data', 'pillow'):
      peers.ask(pipelines[name], 'views')
      views = np.load(f'{folder}/{name}.npy').astype(float)
      errors = np.mean((views - reference) ** 2, (1, 2, 3))
      psnrs[name] = float(np.mean(10 * np.log10(255**2 / errors)))
  return [
    measure.ratio(
      results, 'ours', 'decode only', 'ours over decoding alone, per CPU-second'
    ),
    measure.ratio(
      results, 'ours', 'pillow', 'ours over Pillow, per CPU-second'
    ),
    measure.median('ours', results['ours'], 'images/CPU-s'),
    measure.Figure('PSNR of Pillow', psnrs['pillow'], 'dB'),
    measure.Figure(PSNR, psnrs['ours'], 'dB'),
    measure.Figure(PSNR_TF_DATA, psnrs['tf.data'], 'dB'),
    measure.ratio(results, 'ours', 'tf.data', RATIO),
  ]


def last_line(figures: Sequence[measure.Figure]) -> str:
  """Returns the line of results that scripts of users read."""
  values = {figure.name: figure.value for figure in figures}
  return (
    f'ratio={values[RATIO]:.2f} psnr={values[PSNR]:.1f} '
    f'psnr_tfdata={values[PSNR_TF_DATA]:.1f}'
  )


def budget() -> None:
  """Prints microseconds per image of each part of our input pipeline."""
  with tempfile.TemporaryDirectory() as folder:
    input_pipelines.write_photographs(Path(folder))
    with _start('ours', folder) as process:
      budget = peers.ask(process, 'budget')
  rest = 2 * budget['all'] - sum(budget.values())
  print('microseconds of CPU time per image')
  for part, microseconds in {**budget, 'rest': rest}.items():
    print(f'{part:16}{microseconds:8.1f}')


def stream(rounds: int) -> list[measure.Figure]:
  """Times and weighs a training stream of ImageNet's length."""
  del rounds
  count = imagenet_metadata.NUM_EXAMPLES
  with tempfile.TemporaryDirectory() as folder:
    print(f'writing {count["train"]:,} small images', flush=True)
    image = input_pipelines.tiny_image()
    input_pipelines.write_imagenet(
      Path(folder),
      itertools.repeat(image, count['train']),
      itertools.repeat(image, count['validation']),
      num_shards=1024,
    )
    start = time.perf_counter()
    with _start('stream', folder, '10000') as process:
      without_python = peers.read_answer(process)['first']
      to_first = time.perf_counter() - start
      print(
        f'first batch after {to_first:.1f} s, {without_python:.1f} s of them '
        'after starting Python',
        flush=True,
      )
      early, late = (peers.read_answer(process)['bytes'] for _ in range(2))
  return [
    measure.Figure('first batch', to_first, 's'),
    measure.Figure('resident memory', late / 1e9, 'GB'),
    measure.Figure('its growth', 100 * (late / early - 1), '%'),
  ]
