"""The loop in this process, on eight devices: what no kill hits by luck."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import threading
import time

import jax
import numpy as np
import pytest
from stand_ins import TIMEOUT
import written_images

import bn_repro
from bn_repro import config as config_lib
from bn_repro import numerics, parallel
from bn_repro.data import datasets
from bn_repro.errors import UserError
from bn_repro.runtime import metric_writer
from bn_repro.runtime import workdir as workdir_lib
from bn_repro.runtime.preemption import Preempted
from bn_repro.runtime.profiling import Profile
from bn_repro.runtime.workdir import check_metrics, read_json
from bn_repro.training import (
  checkpoint,
  evaluation,
  model_file,
  run_info,
  train,
)
from bn_repro.training import experiment as experiment_lib
from bn_repro.training import timing as timing_lib
from bn_repro.training.metrics import Sums

# 64 images to validate on and 130 to test on.
OVERRIDES = (
  'data.name=synthetic',
  'data.holdout=64',
  'total_steps=6',
  'log_every=4',
  'eval_every=3',
  'checkpoint_every=5',
  'bn.population_batches=3',
  'batch_size=64',
)
# The loop does not depend on the network: the MNIST network compiles fastest.
MLP = (
  'data.image_size=28',
  'data.distorted_copies=0',
  'data.shuffle=within_shard',
  'eval_split=validation',
  'steps_per_call=1',
  'optim.momentum=0.9',
  'optim.weight_decay=1e-4',
)
INCEPTION = ('model.name=inception_tiny',)


class StopAt:
  """Raises at the n-th check, by default as after a signal."""

  def __init__(self, stop_at, error):
    self.checks = 0
    self.stop_at = stop_at
    self.error = error

  def check(self):
    self.checks += 1
    if self.checks == self.stop_at:
      raise self.error

  def run(self, work):
    return work()


# In one worker, so that each experiment compiles once.
pytestmark = pytest.mark.xdist_group('train')


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
  """Experiments of one config are compiled once for all tests."""
  compile_steps = experiment_lib.Experiment.compile

  def cached(experiment, state):
    key = config_lib.digest(experiment.config)
    if key not in _COMPILED:
      _COMPILED[key] = compile_steps(experiment, state).steps
    steps = _COMPILED[key]
    return dataclasses.replace(experiment, steps=steps)

  monkeypatch.setattr(experiment_lib.Experiment, 'compile', cached)
  monkeypatch.setattr(parallel, 'create_replica_check', _REPLICA_CHECK)


_COMPILED = {}
_REPLICA_CHECK = functools.cache(parallel.create_replica_check)


STOPPED = Preempted('stopped by a test')


def train_once(
  workdir,
  *overrides,
  variant='bn_mnist',
  stop_at=None,
  error=STOPPED,
  accept_lost_metrics=False,
):
  """One start of a run; returns its status and how often it could stop."""
  config = config_lib.load(
    f'configs/{variant}.py:mini',
    (
      *OVERRIDES,
      *(MLP if variant.endswith('mnist') else INCEPTION),
      *overrides,
    ),
  )
  workdir = workdir_lib.Workdir(workdir)
  workdir.check(config)
  workdir.claim()
  preemption = StopAt(stop_at, error)
  try:
    status = train.train_and_evaluate(
      config,
      datasets.check(config),
      workdir,
      preemption,
      'test.py',
      accept_lost_metrics=accept_lost_metrics,
    )
  finally:
    workdir.release()
  return status, preemption.checks


def lines(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [
    {k: v for k, v in json.loads(line).items() if k != 'timing'}
    for line in text.splitlines()
  ]


def variables(workdir):
  directory = (workdir / 'checkpoints').absolute()
  with checkpoint.Checkpoints(directory, keep=None) as checkpoints:
    return checkpoints.steps()[-1], checkpoints.restore_variables()


def assert_equal_trees(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  'name, every', [('synthetic', 1), ('folder', 4), ('npz', 4)]
)
def test_interrupted_at_every_place(name, every, tmp_path):
  """In each step, evaluation batch and population batch in turn."""
  data = (f'data.name={name}', 'data.binarize=false')
  if name == 'folder':
    written_images.write_folder(tmp_path / 'data', 256)
    data += (f'data.data_dir={tmp_path / "data"}',)
  elif name == 'npz':
    written_images.write_npz(tmp_path / 'data.npz', 256)
    data += (f'data.data_dir={tmp_path / "data.npz"}',)
  reference = tmp_path / 'reference'
  _, checks = train_once(reference, *data)
  expected = lines(reference)
  assert checks > 14
  evaluated = [line for line in expected if line['split'] == 'validation']
  assert all(line['num_examples'] == 64 for line in evaluated)
  for stop_at in range(1, checks + 1, every):
    workdir = tmp_path / str(stop_at)
    status, _ = train_once(workdir, *data, stop_at=stop_at)
    assert status == 'preempted'
    saved, _ = variables(workdir)
    ended = json.loads((workdir / 'status.json').read_text())
    assert saved == ended['step']
    assert train_once(workdir, *data)[0] == 'done'
    assert lines(workdir) == expected, stop_at
    assert_equal_trees(variables(workdir), variables(reference))


def test_line_at_a_checkpoint_is_written_once(tmp_path):
  """The line of step 3 comes after its checkpoint, then the run is killed."""
  every = ('log_every=3', 'eval_every=100')
  train_once(tmp_path, 'eval_every=100', stop_at=3)
  with pytest.raises(RuntimeError, match='killed'):
    train_once(tmp_path, *every, stop_at=1, error=RuntimeError('killed'))
  assert train_once(tmp_path, *every)[0] == 'done'
  steps = [line['step'] for line in lines(tmp_path) if line['split'] == 'train']
  assert steps == [3, 6]


def test_stopped_while_the_checkpoint_of_the_step_is_being_saved(
  tmp_path, monkeypatch
):
  """It is not saved a second time."""
  read, wait = checkpoint.read, checkpoint.Checkpoints.wait
  stopped, waited = threading.Event(), threading.Event()

  def read_later(*arguments):
    assert waited.wait(TIMEOUT)
    return read(*arguments)

  def tell_and_wait(checkpoints):
    if stopped.is_set():
      waited.set()
    wait(checkpoints)

  class Stop(StopAt):
    def check(self):
      if self.checks == self.stop_at - 1:
        stopped.set()
      super().check()

  monkeypatch.setattr(checkpoint, 'read', read_later)
  monkeypatch.setattr(checkpoint.Checkpoints, 'wait', tell_and_wait)
  monkeypatch.setitem(globals(), 'StopAt', Stop)
  every = ('eval_every=100', 'checkpoint_every=5')
  assert train_once(tmp_path, *every, stop_at=5)[0] == 'preempted'
  assert variables(tmp_path)[0] == 5


def test_a_last_checkpoint_that_cannot_be_read_is_a_failure(
  tmp_path, monkeypatch
):
  read = checkpoint.read

  def read_damaged(path, like):
    if path.name.startswith('6.'):
      (path / 'state' / 'manifest.ocdbt').write_bytes(b'')
    return read(path, like)

  monkeypatch.setattr(checkpoint, 'read', read_damaged)
  with pytest.raises(checkpoint.SaveFailed, match='read back'):
    train_once(tmp_path)
  ended = json.loads((tmp_path / 'status.json').read_text())
  assert ended['status'] == 'failed'
  monkeypatch.setattr(checkpoint, 'read', read)
  assert variables(tmp_path)[0] == 5
  assert train_once(tmp_path)[0] == 'done'


def test_a_line_that_is_due_comes_before_the_stop(tmp_path):
  train_once(tmp_path, 'eval_every=100', stop_at=4)
  steps = [line['step'] for line in lines(tmp_path) if line['split'] == 'train']
  assert steps == [4]


def test_lines_of_a_run(tmp_path):
  train_once(tmp_path)
  found = [
    (line['step'], line['split'], line.get('statistics'), line['num_examples'])
    for line in lines(tmp_path)
  ]
  assert found == [
    (3, 'validation', 'moving', 64),
    (3, 'validation', 'population', 64),
    (4, 'train', None, 256),
    (6, 'train', None, 128),
    (6, 'validation', 'moving', 64),
    (6, 'test', 'moving', 130),
    (6, 'validation', 'population', 64),
    (6, 'test', 'population', 130),
  ]


@pytest.mark.parametrize('left', [None, 1])
def test_lost_metrics(left, tmp_path):
  """A checkpoint knows the lines before it; `left` of them remain."""
  train_once(tmp_path, 'log_every=1', stop_at=8)
  metrics = tmp_path / 'metrics.jsonl'
  before = metrics.read_text().splitlines(keepends=True)
  assert len(before) > 2
  if left is None:
    metrics.unlink()
  else:
    metrics.write_text(''.join(before[:left]))
  files = {
    path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()
  }
  with pytest.raises(UserError, match='--accept_lost_metrics'):
    train_once(tmp_path, 'log_every=1')
  for path, content in files.items():
    if path.name != 'lock':
      assert path.read_bytes() == content
  train_once(tmp_path, 'log_every=1', accept_lost_metrics=True)
  after = metrics.read_text().splitlines(keepends=True)
  assert before[: left or 0] == after[: left or 0]
  # The end is recorded.
  check_metrics(metrics, read_json(tmp_path / 'status.json')['metrics'])
  metrics.write_text(''.join(after[:-1]))
  with pytest.raises(UserError, match='metrics.jsonl'):
    check_metrics(metrics, read_json(tmp_path / 'status.json')['metrics'])


def test_missing_checkpoints_are_no_new_run(tmp_path):
  train_once(tmp_path, 'log_every=1', stop_at=8)
  shutil.move(tmp_path / 'checkpoints', tmp_path / 'elsewhere')
  before = (tmp_path / 'metrics.jsonl').read_bytes()
  with pytest.raises(UserError, match='checkpoints of this run are missing'):
    train_once(tmp_path, 'log_every=1')
  assert (tmp_path / 'metrics.jsonl').read_bytes() == before
  assert not list(tmp_path.glob('checkpoints/*'))
  shutil.rmtree(tmp_path / 'checkpoints', ignore_errors=True)
  shutil.move(tmp_path / 'elsewhere', tmp_path / 'checkpoints')
  assert train_once(tmp_path, 'log_every=1')[0] == 'done'


def test_lines_are_on_disk_before_their_checkpoint(tmp_path, monkeypatch):
  events = []
  for owner, name in (
    (metric_writer.MetricWriter, 'write'),
    (metric_writer.MetricWriter, 'sync'),
    (checkpoint.Checkpoints, 'save'),
  ):
    method = getattr(owner, name)

    def recorded(*arguments, name=name, method=method):
      events.append(name)
      return method(*arguments)

    monkeypatch.setattr(owner, name, recorded)
  train_once(tmp_path)
  assert events.count('save') == 2
  before = [
    event for event, after in itertools.pairwise(events) if after == 'save'
  ]
  assert before == ['sync', 'sync']


def test_state_whose_replicas_differ_is_not_saved(tmp_path, monkeypatch):
  monkeypatch.setattr(
    parallel,
    'create_replica_check',
    lambda mesh: lambda tree: ['params/kernel', 'params/bias'],
  )
  with pytest.raises(RuntimeError, match=r'step 5: params/kernel and 1 other'):
    train_once(tmp_path)
  assert not list(tmp_path.glob('checkpoints/*'))
  assert json.loads((tmp_path / 'status.json').read_text())['step'] == 5


def test_learning_rate_of_a_line_is_that_of_its_last_step(tmp_path):
  """It is halved every 2.1 steps: 0.3 epochs of 448 images in batches of 64."""
  options = ('optim.decay_epochs=0.3', 'optim.decay_rate=0.5', 'log_every=1')
  train_once(tmp_path, *options, 'eval_every=100')
  found = [
    line['learning_rate']
    for line in lines(tmp_path)
    if line['split'] == 'train'
  ]
  halvings = (0, 0, 0, 1, 1, 2)
  assert found == pytest.approx([0.1 * 64 / 60 / 2**n for n in halvings])


def test_net_without_bn_has_one_form(tmp_path):
  train_once(tmp_path, variant='mnist')
  evaluated = [line for line in lines(tmp_path) if line['split'] != 'train']
  assert [line['step'] for line in evaluated] == [3, 6, 6]
  assert all('statistics' not in line for line in evaluated)


def test_run_json(tmp_path):
  train_once(tmp_path, stop_at=2)
  train_once(tmp_path)
  facts = json.loads((tmp_path / 'run.json').read_text())
  assert facts['applied_learning_rate'] == pytest.approx(0.1 * 64 / 60)
  assert facts['images_per_statistic'] == 64
  assert facts['config_file'] == 'test.py'
  assert len(facts['devices']) == 8
  assert facts['versions']['jax'] == jax.__version__
  assert facts['version'] == bn_repro.__version__
  assert facts['num_parameters'] == sum(
    leaf.size for leaf in jax.tree.leaves(variables(tmp_path)[1]['params'])
  )
  kernels = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      variables(tmp_path)[1]['params']
    )
    if path[-1].key == 'kernel'
  ]
  # In a network of dense layers each weight is used once for an image.
  assert facts['multiply_adds'] == sum(kernel.size for kernel in kernels)
  digest = hashlib.sha256(numerics.FILE.read_bytes()).hexdigest()
  assert digest.startswith(facts['numerics']) and len(facts['numerics']) == 12
  assert [start['start_step'] for start in facts['earlier_starts']] == [0]
  assert facts['start_step'] > 0


def test_jumps_of_the_clock(tmp_path, monkeypatch):
  """Time runs backwards, and the oldest checkpoint has the newest date."""
  train_once(tmp_path / 'reference')
  now = itertools.count(2e9, -1000)
  monkeypatch.setattr(time, 'time', lambda: next(now))
  train_once(tmp_path / 'run', 'checkpoint_every=2', stop_at=12)
  saved = sorted((tmp_path / 'run' / 'checkpoints').iterdir())
  assert len(saved) > 1
  for age, directory in enumerate(saved):
    os.utime(directory, (2e9 - age * 1e6,) * 2)
  step = int(saved[-1].name)
  train_once(tmp_path / 'run', 'checkpoint_every=2')
  assert read_json(tmp_path / 'run' / 'run.json')['start_step'] == step
  assert lines(tmp_path / 'run') == lines(tmp_path / 'reference')
  text = (tmp_path / 'run' / 'metrics.jsonl').read_text()
  timings = [json.loads(x).get('timing') for x in text.splitlines()]
  assert all(timing['seconds'] > 0 for timing in timings if timing)


def test_other_versions_are_told(tmp_path, monkeypatch, capsys):
  train_once(tmp_path, stop_at=8)
  versions = run_info.versions()
  monkeypatch.setattr(run_info, 'versions', lambda: {**versions, 'jax': '0.1'})
  train_once(tmp_path)
  out = capsys.readouterr().out
  assert f'warning: jax is 0.1 now and was {versions["jax"]}' in out


def test_other_data_are_refused(tmp_path, monkeypatch):
  train_once(tmp_path, stop_at=5)
  load = datasets.SOURCES['synthetic'].load

  def other(data):
    dataset = load(data)
    dataset.splits['train'].images[0, 0, 0, 0] ^= 255
    return dataset

  monkeypatch.setitem(datasets.SOURCES, 'synthetic', datasets.Source(other))
  with pytest.raises(UserError, match='data fingerprint'):
    train_once(tmp_path)


def wall(timing):
  """Seconds since the line before, evaluations included."""
  shares = timing['shares']
  assert set(shares) == {*timing_lib.KINDS, 'idle'}
  assert sum(shares.values()) == pytest.approx(1)
  besides = ('compile', 'evaluation', 'checkpoint')
  return timing['seconds'] / (1 - sum(shares[kind] for kind in besides))


@pytest.fixture
def skip(monkeypatch):
  """Moves the clock by so much that the time of a busy machine vanishes."""
  skipped = [0.0]
  monotonic = time.monotonic
  monkeypatch.setattr(time, 'monotonic', lambda: monotonic() + sum(skipped))
  return skipped.append


def test_shares_of_the_time_are_written_and_said(
  skip, tmp_path, capsys, monkeypatch
):
  """An evaluation is a part of its interval, and of the whole."""
  evaluate = evaluation.evaluate_split

  def slowly(*arguments):
    skip(1000)
    return evaluate(*arguments)

  monkeypatch.setattr(evaluation, 'evaluate_split', slowly)
  train_once(tmp_path, 'total_steps=6', 'eval_every=3', 'log_every=2')
  text = (tmp_path / 'metrics.jsonl').read_text()
  timings = {
    line['step']: line['timing']
    for line in map(json.loads, text.splitlines())
    if line['split'] == 'train'
  }
  spent = {
    step: timing['shares']['evaluation'] * wall(timing)
    for step, timing in timings.items()
  }
  assert spent[2] == 0
  # After step 3, with moving averages and with population statistics.
  assert 2000 <= spent[4] < 3000
  (said,) = (
    line
    for line in capsys.readouterr().out.splitlines()
    if line.startswith('time: ')
  )
  assert 'evaluation' in said and 'idle' in said


def test_a_device_that_works_does_not_wait(skip):
  ready = threading.Event()

  class Results:
    def block_until_ready(self):
      assert ready.wait(TIMEOUT)

  timer = timing_lib.DeviceIdleTimer()
  start = time.monotonic()
  timer.works_on(Results())
  skip(1000)
  idle_while_working = timer.idle_seconds(start)
  ready.set()
  assert idle_while_working == 0
  timer._finished.result()
  skip(1000)
  assert 1000 <= timer.idle_seconds(start) < 2000


def test_waiting_for_data_is_measured_and_said(
  skip, tmp_path, monkeypatch, capsys
):
  """Batches that take as long as several steps, then some that take none."""
  stacked_batches = experiment_lib.Experiment.stacked_batches
  works_on = timing_lib.DeviceIdleTimer.works_on
  timers = []

  def slowly(experiment, first, last):
    for step, batch in enumerate(stacked_batches(experiment, first, last)):
      if timers:
        timers[-1]._finished.result()
      if step < 4:
        skip(1000)
      yield batch

  def note(timer, results):
    works_on(timer, results)
    timers.append(timer)

  monkeypatch.setattr(timing_lib.DeviceIdleTimer, 'works_on', note)
  monkeypatch.setattr(experiment_lib.Experiment, 'stacked_batches', slowly)
  train_once(tmp_path, 'log_every=2', 'total_steps=8', 'eval_every=8')
  text = (tmp_path / 'metrics.jsonl').read_text()
  timings = [
    line['timing']
    for line in map(json.loads, text.splitlines())
    if line['split'] == 'train'
  ]
  for timing in timings[:2]:
    waited = timing['shares']['waiting_for_data'] * wall(timing)
    assert 2000 <= waited < timing['seconds'] + 1e-9 < 3000
  for timing in timings[2:]:
    assert timing['shares']['waiting_for_data'] * wall(timing) < 1000
  # Once for both slow intervals, with what may help. (A busy machine may be
  # slow again in those after them.)
  said = capsys.readouterr().out.splitlines()
  (second_line,) = (
    number for number, line in enumerate(said) if line.startswith('step 4/8')
  )
  (warning,) = (
    line for line in said[:second_line] if line.startswith('warning')
  )
  # The first interval may have compiled for longer than it has waited.
  shares = [timing['shares']['waiting_for_data'] for timing in timings]
  first_above = next(share for share in shares if share > 0.1)
  assert f'{first_above:.0%}' in warning
  assert '--config.data.num_workers' in warning


def test_shorter_run_is_refused(tmp_path):
  train_once(tmp_path)
  with pytest.raises(UserError, match='at step 6, past the 5'):
    train_once(tmp_path, 'total_steps=5')


def test_warm_start(tmp_path):
  train_once(tmp_path / 'source')
  config = config_lib.load('configs/bn_mnist.py:mini', (*OVERRIDES, *MLP))
  experiment = experiment_lib.create_experiment(config, datasets.check(config))
  cold = experiment.initial_state()
  warm = checkpoint.warm_start(cold, str(tmp_path / 'source'))
  _, source = variables(tmp_path / 'source')
  assert_equal_trees(warm.params, source['params'])
  assert_equal_trees(warm.batch_stats, source['batch_stats'])
  assert_equal_trees(warm.opt_state, cold.opt_state)
  assert warm.step == 0
  warm_run = tmp_path / 'warm'
  assert train_once(warm_run, f'init_from={tmp_path / "source"}')[0] == 'done'
  # It is not the run that starts from nothing.
  assert lines(warm_run)[0]['loss'] != lines(tmp_path / 'source')[0]['loss']


def test_warm_start_from_nothing_leaves_nothing(tmp_path):
  with pytest.raises(UserError, match='does not exist'):
    train_once(tmp_path / 'run', f'init_from={tmp_path}/none')
  assert list(tmp_path.iterdir()) == []


def test_warm_start_from_another_network(tmp_path):
  source = tmp_path / 'source'
  train_once(source)
  with pytest.raises(UserError, match='a different network'):
    train_once(tmp_path / 'warm', f'init_from={source}', 'model.width=0.25')
  with pytest.raises(UserError, match='init_from'):
    train_once(tmp_path / 'warm', f'init_from={tmp_path / "nowhere"}')


def test_polyak_averages_are_evaluated_with_their_own_statistics(tmp_path):
  train_once(tmp_path, 'optim.polyak_decay=0.9')
  evaluated = [line for line in lines(tmp_path) if line['split'] != 'train']
  assert {line['statistics'] for line in evaluated} == {'population'}
  plain = tmp_path / 'plain'
  train_once(plain)
  assert_equal_trees(variables(tmp_path)[1], variables(plain)[1])
  averaged = evaluated[-1]['loss']
  assert averaged != lines(plain)[-1]['loss']
  # The model holds the averages, and not the parameters of the checkpoint.
  model = model_file.read(tmp_path / model_file.NAME).variables['params']
  trained = variables(tmp_path)[1]['params']
  assert not np.array_equal(
    model['classifier']['kernel'], trained['classifier']['kernel']
  )


def test_a_run_whose_model_is_lost_writes_it_again(tmp_path):
  """Also after its last step; its lines stay as they are."""
  train_once(tmp_path)
  path = tmp_path / model_file.NAME
  digest, written = model_file.read(path).digest, lines(tmp_path)
  path.unlink()
  train_once(tmp_path)
  assert model_file.read(path).digest == digest
  assert lines(tmp_path) == written


def test_evaluation_does_not_change_training(tmp_path):
  often, never = tmp_path / 'often', tmp_path / 'never'
  train_once(often, 'eval_every=1')
  train_once(never, 'eval_every=100')
  assert_equal_trees(variables(often), variables(never))


def test_tensorboard(tmp_path):
  from tensorboardX.proto.event_pb2 import Event

  train_once(tmp_path, 'tensorboard=true')
  (path,) = (tmp_path / 'tensorboard').iterdir()
  content = path.read_bytes()
  tags = {}
  position = 0
  while position < len(content):
    length = int.from_bytes(content[position : position + 8], 'little')
    event = Event.FromString(content[position + 12 : position + 12 + length])
    for value in event.summary.value:
      tags[value.tag, event.step] = value.simple_value
    position += length + 16
  last = lines(tmp_path)[-1]
  assert tags['test_population/accuracy', 6] == pytest.approx(last['accuracy'])
  assert ('train/learning_rate', 4) in tags


def test_divergence_that_an_evaluation_sees_first(tmp_path, monkeypatch):
  """Parameters that are finite, and too large to compute with."""
  evaluate = evaluation.evaluate_split

  def overflowing(*args):
    sums, percentiles = evaluate(*args)
    return sums.replace(loss=float('inf')), percentiles

  monkeypatch.setattr(evaluation, 'evaluate_split', overflowing)
  assert train_once(tmp_path)[0] == 'diverged'
  ended = json.loads((tmp_path / 'status.json').read_text())
  assert ended['step'] == 3
  assert 'validation loss inf' in ended['reason']
  assert lines(tmp_path) == []


def test_warm_start_survives_a_change_of_its_source(tmp_path):
  """What a run starts from is its own from the first moment."""
  source, warm = tmp_path / 'source', tmp_path / 'warm'
  train_once(source)
  override = f'init_from={source}'
  assert train_once(warm, override, stop_at=1)[0] == 'preempted'
  # As if it had been killed before its first interval was over.
  shutil.rmtree(warm / 'checkpoints' / '1')
  train_once(source, 'total_steps=9')
  train_once(warm, override)
  untouched, reference = tmp_path / 'untouched', tmp_path / 'reference'
  train_once(untouched)
  train_once(reference, f'init_from={untouched}')
  assert lines(warm) == lines(reference)


@pytest.mark.parametrize(
  'sums, expected',
  [
    ({'loss': 8.0}, None),
    ({'loss': np.nan}, 'loss nan'),
    ({'loss': np.inf}, 'loss inf'),
    ({'loss': 40.0}, None),
    ({'loss': 40.1}, 'above divergence_loss=10'),
  ],
)
def test_reasons_of_divergence(sums, expected):
  """Of four examples, with a limit of 10 on their mean loss."""
  reason = train._divergence(Sums(count=4, **sums), 10.0)
  assert reason is None if expected is None else expected in reason


@pytest.mark.parametrize('part', ['params', 'batch_stats'])
@pytest.mark.parametrize('method', ['log', 'save'])
def test_state_that_is_not_finite_is_divergence(part, method):
  """Also if the loss of the step is finite: it does not depend on it yet."""
  config = config_lib.load('configs/bn_mnist.py:mini', (*OVERRIDES, *MLP))
  experiment = experiment_lib.create_experiment(config, datasets.check(config))
  state = experiment.initial_state()
  # An infinite momentum makes a parameter infinite, and a variance stays so.
  of = {'params': 'opt_state', 'batch_stats': 'batch_stats'}[part]
  ends = {'params': ('trace', 'bias'), 'batch_stats': ('var',)}[part]
  changed = 0

  def change(path, x):
    nonlocal changed
    name = jax.tree_util.keystr(path)
    if not all(end in name for end in ends):
      return x
    changed += x.size
    return np.full_like(x, np.inf)

  tree = jax.tree_util.tree_map_with_path(change, getattr(state, of))
  trainer = train.Trainer(
    experiment,
    state.replace(**{of: tree}),
    Sums(),
    None,
    None,
    None,
    lambda: None,
  )
  trainer.compile(StopAt(0, None))
  trainer.advance(experiment.stacked_batches(0, 1))
  with pytest.raises(train.Diverged, match=f'^{changed} parameters'):
    getattr(trainer, method)()
  # The loss of that step was finite.
  assert trainer.step == 1 and np.isfinite(trainer._interval_sums.loss)


def test_divergence_names_the_step(tmp_path):
  status, _ = train_once(
    tmp_path, 'optim.learning_rate=1e6', variant='inception'
  )
  assert status == 'diverged'
  ended = json.loads((tmp_path / 'status.json').read_text())
  assert ended['step'] == 2
  assert not any(line['step'] >= 2 for line in lines(tmp_path))


def test_indivisible_batch_is_refused_and_leaves_nothing(tmp_path):
  with pytest.raises(UserError, match='not a multiple of the 8 devices'):
    train_once(tmp_path / 'run', 'batch_size=36')
  assert not (tmp_path / 'run').exists()


def test_profile_of_a_window_of_steps(tmp_path):
  """Steps have their numbers in it, and operations their layers' names."""
  train_once(tmp_path, 'profile_steps=2', 'profile_first_step=3')
  (trace,) = (tmp_path / 'profile').rglob('*.xplane.pb')
  content = trace.read_bytes()
  assert b'hidden1' in content and b'step_num' in content
  plain = tmp_path / 'plain'
  train_once(plain)
  assert not (plain / 'profile').exists()
  assert_equal_trees(variables(tmp_path), variables(plain))


@pytest.mark.parametrize(
  'first_step, num_steps, traced',
  [
    (3, 2, [0]),  # Within a call.
    (8, 4, [5, 10]),
    (5, 5, [5]),
    (10, 0, []),
    (99, 5, []),
  ],
)
def test_profile_of_calls_of_five_steps(
  first_step, num_steps, traced, tmp_path, monkeypatch
):
  """Those are traced that have a step of the window."""
  tracing, found = [], []
  monkeypatch.setattr(jax.profiler, 'start_trace', tracing.append)
  monkeypatch.setattr(jax.profiler, 'stop_trace', tracing.clear)
  with contextlib.closing(Profile(tmp_path, first_step, num_steps)) as profile:
    for step in range(0, 20, 5):
      profile.before_call(step, 5)
      if tracing:
        found.append(step)
  assert found == traced and not tracing
