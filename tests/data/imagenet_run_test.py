"""Training on a small ImageNet, and on a folder, in processes of their own."""

import os
import signal
import subprocess
import sys

import pytest
import support
import written_imagenet

from bn_repro import cli, evaluate
from bn_repro.inference import probabilities
from bn_repro.runtime.workdir import read_metrics

# In one worker, so that the run which others are compared with trains once.
pytestmark = pytest.mark.xdist_group('imagenet_run')


def arguments(data, workdir, *overrides):
  name, data_dir = data
  return (
    '--config=configs/bn_x5.py',
    f'--workdir={workdir}',
    # Images are read and cropped on the host. This network compiles fast.
    '--config.model.name=mlp',
    '--config.data.distortion=none',
    f'--config.data.data_dir={data_dir}',
    f'--config.data.name={name}',
    '--config.data.num_shards=4',
    '--config.data.image_size=64',
    '--config.batch_size=8',
    '--config.total_steps=40',
    '--config.log_every=7',
    '--config.eval_every=10',
    '--config.checkpoint_every=5',
    '--config.bn.population_batches=2',
    *overrides,
  )


def train(*args):
  result = support.run(*arguments(*args))
  assert result.returncode == 0, result.stderr
  return result


def stop(line, signal_number, *args):
  """Signals the whole process group after a line, as a scheduler does."""
  process = support.start(*arguments(*args))
  support.wait_for_line(process, line)
  os.killpg(process.pid, signal_number)
  return support.finish(process)[0]


def write(name, data_dir, splits):
  """Writes a copy of ImageNet, or the same images as `folder`; names it."""
  if name == 'imagenet_stand_in':
    written_imagenet.write(data_dir, splits)
  else:
    for split, examples in splits.items():
      for file_name, label, encoded in examples:
        path = data_dir / split / str(label) / file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
  return name, data_dir


@pytest.fixture(
  params=[
    'imagenet_stand_in',
    pytest.param('folder', marks=pytest.mark.slow),
  ],
  scope='module',
)
def name(request):
  return request.param


@pytest.fixture(scope='module')
def copy(name, tmp_path_factory):
  data_dir = tmp_path_factory.mktemp('data')
  return write(name, data_dir, written_imagenet.examples())


@pytest.fixture(scope='module')
def reference(copy, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('reference') / 'run'
  train(copy, workdir)
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


def test_the_model_of_a_run_is_evaluated(
  reference, tmp_path, monkeypatch, capsys
):
  """With one crop as in the run, and with 144 of each image."""
  monkeypatch.setattr(cli, 'set_up_jax', lambda config: None)
  last = read_metrics(reference / 'metrics.jsonl')[-1]
  assert (last['split'], last['statistics']) == ('validation', 'population')
  path = tmp_path / 'p.npz'
  flags = [f'--workdir={reference}', f'--save_probabilities={path}']
  for crops in (1, 144):
    assert evaluate.main([*flags, f'--crops={crops}']) == 0
    found = probabilities.read(path)
    assert len(set(found.labels)) > 1 and len(found.labels) == 10
    assert f'step {last["step"]}  validation, pop' in capsys.readouterr().out
    if crops == 1:
      one = found.metrics()
    path.unlink()
  assert one['accuracy'] == last['accuracy']
  assert one['loss'] == pytest.approx(last['loss'], rel=1e-4)


@pytest.mark.parametrize(
  'signal_number, workers',
  [
    (signal.SIGKILL, (0, 2)),
    pytest.param(signal.SIGTERM, (2, 0), marks=pytest.mark.slow),
  ],
)
def test_resumed_with_another_number_of_workers(
  signal_number, workers, copy, reference, tmp_path
):
  workdir = tmp_path / 'run'
  before, after = (f'--config.data.num_workers={n}' for n in workers)
  result = stop('step 7/', signal_number, copy, workdir, before)
  if signal_number == signal.SIGTERM:
    assert result.returncode == 75
    assert support.status(workdir)['status'] == 'preempted'
  train(copy, workdir, after)
  support.assert_same_run(workdir, reference)


@pytest.fixture
def damaged(name, tmp_path):
  """Two truncated images: one of 40 for training, one of 10 for validation."""
  splits = written_imagenet.examples()
  for split, index in (('train', 7), ('validation', 1)):
    file_name, label, encoded = splits[split][index]
    splits[split][index] = (file_name, label, encoded[: len(encoded) // 3])
  names = [splits['train'][7][0], splits['validation'][1][0]]
  return write(name, tmp_path / 'data', splits), names


def test_damaged_images_are_counted_and_named(damaged, tmp_path):
  data, names = damaged
  result = train(data, tmp_path / 'run', '--config.data.max_replaced=0.2')
  for name in names:
    assert result.stderr.count(f'{name}: left out') == 1
  lines = support.metrics(tmp_path / 'run')
  evaluated = [line for line in lines if line['split'] == 'validation']
  assert all(line['replaced_examples'] == 1 for line in evaluated)
  assert all(line['num_examples'] == 10 for line in evaluated)
  # 40 steps of 8 see each of 40 images eight times.
  trained = [line for line in lines if line['split'] == 'train']
  assert sum(line.get('replaced_examples', 0) for line in trained) == 8


def test_too_many_damaged_images_end_the_run(damaged, tmp_path):
  result = support.run(*arguments(damaged[0], tmp_path / 'run'))
  assert result.returncode == 1
  errors = result.stderr.splitlines()
  (line,) = (line for line in errors if line.startswith('error'))
  assert 'data.max_replaced=0.01' in line
  assert 'Traceback' not in result.stderr
  found = support.status(tmp_path / 'run')
  assert found['status'] == 'failed'
  assert 'could not be decoded' in found['reason']


@pytest.mark.slow
def test_from_archives_to_a_trained_network(tmp_path):
  """Archives, builder, ArrayRecord, BN-x5 at full size, evaluation, resume."""
  archives, data_dir, workdir = (
    tmp_path / name for name in ('archives', 'data', 'run')
  )
  for command in (
    (
      sys.executable,
      'scripts/make_stand_in.py',
      f'--out={archives}',
      '--num_validation=12',
      '--images_per_class=4',
    ),
    (
      'bash',
      'scripts/prepare_imagenet.sh',
      f'--manual_dir={archives}',
      f'--data_dir={data_dir}',
      '--stand_in',
    ),
  ):
    subprocess.run(
      command, cwd=support.ROOT, check=True, timeout=support.TIMEOUT
    )
  full = (
    '--config.model.name=inception',
    '--config.data.distortion=reduced',
    '--config.data.image_size=224',
    '--config.batch_size=4',
    '--config.bn.population_batches=1',
    '--config.log_every=1',
    '--config.eval_every=3',
    '--config.checkpoint_every=1',
    '--config.total_steps=3',
  )
  run = (('imagenet_stand_in', data_dir), workdir, *full)
  result = stop('step 1/3', signal.SIGTERM, *run)
  assert result.returncode == 75
  stopped_at = support.status(workdir)['step']
  assert 1 <= stopped_at < 3
  result = train(*run)
  assert f'checkpoint of step {stopped_at}' in result.stdout
  lines = support.metrics(workdir)
  steps = [line['step'] for line in lines if line['split'] == 'train']
  assert steps == [1, 2, 3]
  evaluated = [line for line in lines if line['split'] == 'validation']
  assert [line['statistics'] for line in evaluated] == ['moving', 'population']
  assert all(line['num_examples'] == 12 for line in evaluated)
