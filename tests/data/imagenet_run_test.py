"""Training on a small ImageNet: real processes, real files."""

import os
import signal
import subprocess
import sys

import pytest
from resume_test import TESTS, assert_same_run, environment, metrics, status
import written_imagenet

from bn_repro.runtime.workdir import read_metrics


def command(data_dir, workdir, *overrides, program=('tests/tiny.py',)):
  return [
    sys.executable,
    *program,
    '--config=configs/bn_x5.py',
    f'--workdir={workdir}',
    f'--config.data.data_dir={data_dir}',
    '--config.data.stand_in=true',
    '--config.data.num_shards=4',
    '--config.data.image_size=64',
    '--config.batch_size=8',
    '--config.model.width=0.125',
    '--config.total_steps=40',
    '--config.log_every=7',
    '--config.eval_every=10',
    '--config.checkpoint_every=5',
    '--config.bn.population_batches=2',
    *overrides,
  ]


def start(*arguments, **options):
  return subprocess.Popen(
    command(*arguments, **options),
    cwd=TESTS.parent,
    env=environment(PYTHONUNBUFFERED='1'),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def run(*arguments, **options):
  process = start(*arguments, **options)
  out, err = process.communicate(timeout=500)
  return process.returncode, out, err


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp('data')
  written_imagenet.write(data_dir, written_imagenet.examples())
  return data_dir


@pytest.fixture(scope='module')
def reference(copy, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('reference') / 'run'
  code, _, err = run(copy, workdir)
  assert code == 0, err
  return workdir


def test_every_image_is_evaluated_once_and_waiting_is_measured(reference):
  lines = read_metrics(reference / 'metrics.jsonl')
  for line in lines:
    if line['split'] == 'train':
      shares = line['timing']['shares']
      assert 0 <= shares['waiting_for_data'] <= 1
      assert sum(shares.values()) == pytest.approx(1)
    else:
      assert line['num_examples'] == 10
    assert 'replaced_examples' not in line


@pytest.mark.parametrize(
  'signal_number, workers', [('SIGKILL', (0, 2)), ('SIGTERM', (2, 0))]
)
def test_resumed_with_another_number_of_workers(
  signal_number, workers, copy, reference, tmp_path
):
  """The signal goes to the whole group, as a terminal or scheduler sends it."""
  workdir = tmp_path / 'run'
  before, after = (f'--config.data.num_workers={n}' for n in workers)
  process = start(copy, workdir, before)
  for line in process.stdout:
    if line.startswith('step 14/'):
      break
  os.killpg(process.pid, getattr(signal, signal_number))
  process.communicate(timeout=60)
  if signal_number == 'SIGTERM':
    assert process.returncode == 75
    assert status(workdir)['status'] == 'preempted'
  code, _, err = run(copy, workdir, after)
  assert code == 0, err
  assert_same_run(workdir, reference)


@pytest.fixture
def damaged(tmp_path):
  """The second of ten validation images, and one of 40 for training."""
  splits = written_imagenet.examples()
  for split, index in (('train', 7), ('validation', 1)):
    name, label, encoded = splits[split][index]
    splits[split][index] = (name, label, encoded[: len(encoded) // 3])
  written_imagenet.write(tmp_path / 'data', splits)
  return tmp_path / 'data', [splits['train'][7][0], splits['validation'][1][0]]


def test_damaged_images_are_counted_and_named(damaged, tmp_path):
  data_dir, names = damaged
  code, _, err = run(
    data_dir, tmp_path / 'run', '--config.data.max_replaced=0.2'
  )
  assert code == 0, err
  for name in names:
    assert sum(f'{name}: left out' in line for line in err.splitlines()) == 1
  lines = metrics(tmp_path / 'run')
  evaluated = [line for line in lines if line['split'] == 'validation']
  assert all(line['replaced_examples'] == 1 for line in evaluated)
  assert all(line['num_examples'] == 10 for line in evaluated)
  # 40 steps of 8 see each of 40 images eight times.
  trained = [line for line in lines if line['split'] == 'train']
  assert sum(line.get('replaced_examples', 0) for line in trained) == 8


def test_too_many_damaged_images_end_the_run(damaged, tmp_path):
  data_dir, _ = damaged
  code, _, err = run(data_dir, tmp_path / 'run')
  assert code == 1
  (line,) = (line for line in err.splitlines() if line.startswith('error'))
  assert 'data.max_replaced=0.01' in line
  assert 'Traceback' not in err
  found = status(tmp_path / 'run')
  assert found['status'] == 'failed'
  assert 'could not be decoded' in found['reason']


@pytest.mark.slow
def test_the_whole_road(tmp_path):
  """Archives, builder, ArrayRecord, BN-x5 at full size, evaluation, resume."""
  archives, data_dir, workdir = (
    tmp_path / name for name in ('archives', 'data', 'run')
  )

  def call(*arguments):
    subprocess.run(
      arguments, cwd=TESTS.parent, env=environment(), check=True, timeout=500
    )

  call(
    sys.executable,
    'scripts/make_stand_in.py',
    f'--out={archives}',
    '--num_validation=12',
    '--images_per_class=4',
  )
  call(
    'bash',
    'scripts/prepare_imagenet.sh',
    f'--manual_dir={archives}',
    f'--data_dir={data_dir}',
    '--stand_in',
  )
  full = (
    '--config.data.num_shards=4',
    '--config.data.image_size=224',
    '--config.model.width=1.0',
    '--config.batch_size=4',
    '--config.bn.population_batches=1',
    '--config.log_every=1',
    '--config.eval_every=3',
    '--config.checkpoint_every=1',
    '--config.total_steps=3',
  )
  program = ('-m', 'bn_repro.main')
  process = start(data_dir, workdir, *full, program=program)
  for line in process.stdout:
    if line.startswith('step 1/3'):
      break
  os.killpg(process.pid, signal.SIGTERM)
  process.communicate(timeout=300)
  assert process.returncode == 75
  stopped_at = status(workdir)['step']
  assert 1 <= stopped_at < 3
  code, out, err = run(data_dir, workdir, *full, program=program)
  assert code == 0, err
  assert f'going on from the checkpoint of step {stopped_at}' in out
  lines = metrics(workdir)
  assert [line['step'] for line in lines if line['split'] == 'train'] == [
    1,
    2,
    3,
  ]
  evaluated = [line for line in lines if line['split'] == 'validation']
  assert [line['statistics'] for line in evaluated] == ['moving', 'population']
  assert all(line['num_examples'] == 12 for line in evaluated)
