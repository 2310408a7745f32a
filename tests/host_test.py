"""The cores of this process, not those of the machine."""

import os
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest

from bn_repro import host
from bn_repro.data import crops, encoded_split
from bn_repro.sweep import runner

ROOT = Path(__file__).resolve().parent.parent


def test_the_cores_that_the_kernel_allows():
  """As under `taskset -c`."""
  one = sorted(os.sched_getaffinity(0))[:1]
  text = (
    f'import os; os.sched_setaffinity(0, {one}); '
    'from bn_repro import host; print(host.num_cores())'
  )
  result = subprocess.run(
    [sys.executable, '-c', text], cwd=ROOT, capture_output=True, text=True
  )
  assert result.stdout == '1\n', result.stderr


@pytest.mark.parametrize('cores', [{3}, {0, 2, 5}])
def test_decoding_threads_and_trials(cores, monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda process: cores)
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert len(runner.slots(None)) == len(cores)
  used = []

  class Pool:
    def map(self, work, tasks):
      return []

  monkeypatch.setattr(
    encoded_split, '_thread_pool', lambda number: used.append(number) or Pool()
  )
  split = encoded_split.EncodedSplit(
    source=[],
    indices=np.arange(8),
    labels=None,
    num_classes=2,
    image_size=32,
    num_threads=0,
    evaluation_box=crops.central_box,
    as_shown=False,
    identity='test',
  )
  split.evaluation_batch(np.arange(8))
  assert used == [len(cores)]


def test_a_platform_without_affinity(monkeypatch):
  monkeypatch.delattr(os, 'sched_getaffinity')
  monkeypatch.setattr(os, 'cpu_count', lambda: None)
  assert host.num_cores() == 1


def test_nothing_else_counts_cores():
  counting = [
    path.name
    for folder in ('bn_repro', 'scripts')
    for path in (ROOT / folder).rglob('*.py')
    if 'cpu_count(' in path.read_text()
  ]
  assert counting == ['host.py']
