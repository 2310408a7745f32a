"""The cost of an accuracy, of runs written by hand."""

import json

import pytest
from written_runs import edit_facts, read_one, write_run

from bn_repro.report import costs


def write(tmp_path, timings=(), **facts):
  """Writes a run of batches of 64 with these `timing`s every 5 steps."""
  folder = tmp_path / 'run'
  write_run(folder, 'bn_x5', [0.2, 0.8, 0.7, 0.9], 'batch_size=64')
  edit_facts(folder, **facts)
  with (folder / 'metrics.jsonl').open('a') as file:
    for number, timing in enumerate(timings, start=1):
      line = {'step': 5 * number, 'split': 'train', 'timing': timing}
      file.write(json.dumps({**line, 'loss': 1.0, 'accuracy': 0.5}) + '\n')
  return read_one(tmp_path)


def timing(cpu_seconds, images=320):
  return {
    'images_per_second': images / 8,
    'seconds': 8.0,
    'cpu_seconds': cpu_seconds,
  }


def test_the_first_evaluation_that_reaches_the_target_counts(tmp_path):
  timings = [timing(seconds) for seconds in (10, 11, 12, 15, 100, 100)]
  run = write(tmp_path, timings, multiply_adds=1000)
  # At step 20: 20 batches of 64. The lines of steps 5 to 20 count.
  assert costs.to_target(run, 0.75) == costs.Cost(
    steps=40,
    images=1280,
    # Forward, and twice as much backward; multiplications and additions.
    flops=1280 * 3 * 1000 * 2,
    cpu_minutes=pytest.approx(48 / 60),
  )
  assert costs.to_target(run, 0.85).images == 2560
  assert costs.to_target(run, 0.95) is None


def test_images_between_lines_count_at_the_rate_of_the_others(tmp_path):
  """As after a resume, when an interval begins in its middle."""
  run = write(tmp_path, [timing(10), timing(4, images=128)])
  cost = costs.to_target(run, 0.75)
  assert cost.cpu_minutes == pytest.approx(1280 * 14 / 448 / 60)


def test_older_runs_record_less(tmp_path):
  older = {'images_per_second': 40.0, 'seconds': 8.0}
  cost = costs.to_target(write(tmp_path, [older] * 4), 0.75)
  assert cost == costs.Cost(40, 1280, flops=None, cpu_minutes=None)
