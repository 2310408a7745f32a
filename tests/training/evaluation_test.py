"""Exact evaluation and the population statistics, against doing it by hand."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from bn_repro import cli, evaluate, parallel
from bn_repro import config as config_lib
from bn_repro.data import datasets, preprocess
from bn_repro.errors import UserError
from bn_repro.models import factory
from bn_repro.runtime import workdir
from bn_repro.training import checkpoint, evaluation, metrics, run_info
from bn_repro.training.experiment import create_experiment


def never_stop():
  """Nothing interrupts these tests."""


# In one worker, so that each experiment compiles once.
pytestmark = pytest.mark.xdist_group('evaluation')


@functools.cache
def experiment_of(overrides, variant, num_devices):
  config = config_lib.load(
    f'configs/{variant}.py:mini',
    ('model.name=inception_tiny', 'bn.population_batches=4', *overrides),
  )
  mesh = parallel.create_mesh(jax.devices()[:num_devices])
  return create_experiment(config, datasets.check(config), mesh)


def untrained(*overrides, variant='bn_baseline', num_devices=8):
  """An experiment and its initial state."""
  experiment = experiment_of(overrides, variant, num_devices)
  state = experiment.initial_state()
  return experiment, parallel.replicate(experiment.mesh, state)


def trained(*overrides, **options):
  """An experiment and its state after three steps."""
  experiment, state = untrained(*overrides, **options)
  for batches in experiment.stacked_batches(0, 3):
    state, _ = experiment.steps.train_steps(state, batches)
  return experiment, state


def with_eval_step(experiment, eval_step):
  steps = experiment.steps._replace(eval_step=eval_step)
  return dataclasses.replace(experiment, steps=steps)


def logits(experiment, state, images):
  """Inference on all images at once, outside the mesh and the masks."""
  model = factory.create_model(
    experiment.config.model,
    experiment.config.bn,
    experiment.dataset.num_classes,
  )
  state = jax.device_get(state)
  return model.apply(
    {'params': state.params, 'batch_stats': state.batch_stats},
    preprocess.normalize(images, model.dtype, 'symmetric'),
    train=False,
  ).main


@pytest.mark.parametrize('batch_size', [32, 496])
def test_every_example_counts_once(batch_size):
  """500 images: the last batch has 20 and 4, the rest is padding."""
  _, state = trained()
  experiment, _ = untrained(f'batch_size={batch_size}')
  sums, _ = evaluation.evaluate_split(
    experiment, state, 'validation', never_stop
  )
  split = experiment.dataset.splits['validation']
  found = np.asarray(logits(experiment, state, split.images)).astype(np.float64)
  log_softmax = found - np.log(np.exp(found).sum(1, keepdims=True))
  assert sums.count == 500
  assert sums.correct == (found.argmax(1) == split.labels).sum()
  loss = -log_softmax[np.arange(500), split.labels].sum()
  assert sums.loss == pytest.approx(loss, rel=1e-4)


def test_a_lost_example_is_an_error():
  experiment, state = trained()

  def eval_step(state, batch):
    mask = batch['mask'].at[0].set(False)
    return experiment.steps.eval_step(state, {**batch, 'mask': mask})

  lossy = with_eval_step(experiment, eval_step)
  with pytest.raises(RuntimeError, match='counted 484 examples, not 500'):
    evaluation.evaluate_split(lossy, state, 'validation', never_stop)


@pytest.mark.parametrize('limit, fails', [(0.032, False), (0.031, True)])
def test_replaced_examples_are_limited(limit, fails):
  """One of each of 16 batches, of 500 images in all."""
  experiment, state = untrained(f'data.max_replaced={limit}', num_devices=1)

  def eval_step(state, batch):
    del state
    replaced = batch['replaced'].at[0].set(True)
    logits = np.zeros((32, 10), np.float32)
    sums = metrics.classification_sums(logits, {**batch, 'replaced': replaced})
    return sums, {}

  replacing = with_eval_step(experiment, eval_step)
  if not fails:
    sums, _ = evaluation.evaluate_split(
      replacing, state, 'validation', never_stop
    )
    assert (sums.replaced, sums.count) == (16, 500)
    return
  with pytest.raises(UserError, match='validation images: 16 of 500 images'):
    evaluation.evaluate_split(replacing, state, 'validation', never_stop)


@pytest.fixture
def saved_run(tmp_path, monkeypatch, capsys):
  """Saves a run of four devices; returns a function that evaluates it."""
  experiment, state = untrained(
    'bn.statistics=device', 'bn.population_batches=0', num_devices=4
  )
  run = workdir.Workdir(str(tmp_path))
  run.write_config(experiment.config)
  with checkpoint.Checkpoints(
    run.checkpoints, keep=1, identity=run_info.identity(experiment)
  ) as checkpoints:
    checkpoints.save(0, state, {})
    checkpoints.wait()
  monkeypatch.setattr(cli, 'set_up_jax', lambda config: None)
  create_mesh = parallel.create_mesh

  def call(*flags, num_devices=4):
    devices = jax.devices()[:num_devices]
    monkeypatch.setattr(parallel, 'create_mesh', lambda: create_mesh(devices))
    code = evaluate.main([f'--workdir={tmp_path}', *flags])
    return code, capsys.readouterr()

  return call


def test_statistics_of_each_device_are_evaluated_on_as_many(saved_run):
  code, said = saved_run(num_devices=1)
  assert code == 1 and said.err.count('\n') == 1
  assert 'over 8 images, and here they would be over 32' in said.err
  assert 'Evaluate on as many devices' in said.err
  code, said = saved_run()
  assert code == 0 and '(500 images)' in said.out


@pytest.mark.parametrize(
  'key, value',
  [
    ('bn.epsilon', 0.5),
    ('seed', 1),
    ('data.fold', 1),
    ('optim.learning_rate', 1.0),
  ],
)
def test_an_edited_config_is_not_evaluated(key, value, saved_run, tmp_path):
  path = tmp_path / 'config.json'
  config = config_lib.ConfigDict(workdir.read_json(path))
  config.update_from_flattened_dict({key: value})
  path.write_text(config.to_json())
  code, said = saved_run()
  assert code == 1
  assert said.err == (
    f'error: {path}: not the config that the checkpoint of step 0 was trained '
    'with. Restore the file from a copy.\n'
  )


def test_a_run_from_before_there_were_folds_is_not_evaluated(
  saved_run, tmp_path
):
  path = tmp_path / 'config.json'
  config = workdir.read_json(path)
  del config['data']['fold']
  path.write_text(json.dumps(config))
  for flags in ([], ['--split=test', '--other_data']):
    code, said = saved_run(*flags)
    assert code == 1 and said.err.count('\n') == 1
    assert said.err.startswith('error: config.data.fold=-1: the split of a run')


def test_other_data_are_asked_for_by_name(saved_run, monkeypatch):
  load = datasets.SOURCES['mnist_5k'].load

  def relabeled(data):
    dataset = load(data)
    labels = dataset.splits['test'].labels
    labels[:] = (labels + 1) % 10
    return dataset

  monkeypatch.setitem(datasets.SOURCES, 'mnist_5k', datasets.Source(relabeled))
  code, said = saved_run()
  assert code == 1 and said.err.count('\n') == 1
  assert 'fingerprint' in said.err and '--other_data' in said.err
  code, said = saved_run('--other_data')
  assert code == 0 and '(500 images)' in said.out


def test_a_damaged_checkpoint_is_not_evaluated(saved_run, tmp_path):
  path = tmp_path / 'checkpoints' / '0' / 'meta' / 'metadata'
  path.write_text(path.read_text().replace('"step": 0', '"step": 1'))
  code, said = saved_run()
  assert code == 1 and 'does not match its checksum' in said.err


def test_population_statistics_are_algorithm_2(x64):
  """The first layer's, from the images alone, in NumPy.

  Its input does not depend on statistics: E[x] and Var[x] are averages of the
  means and of m' / (m' - 1) times the variances of four batches.
  """
  experiment, state = trained('model.dtype=float64')
  found = evaluation.inference_state(
    experiment, state, evaluation.POPULATION, never_stop
  )
  kernel = np.asarray(state.params['conv1']['conv']['kernel'])
  means, variances = [], []
  for batch in experiment.train_batches(0, 4):
    images = np.asarray(
      preprocess.normalize(batch['image'], np.float64, 'symmetric')
    )
    # TensorFlow's SAME for 5x5 / 2 on 32 pixels: 1 before, 2 after.
    padded = np.pad(images, ((0, 0), (1, 2), (1, 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), (1, 2))
    x = np.einsum('bhwcij,ijcf->bhwf', windows[:, ::2, ::2], kernel)
    x = x.reshape(-1, x.shape[-1])
    assert len(x) == 32 * 16 * 16
    means.append(x.mean(0))
    variances.append(x.var(0, ddof=1))
  stats = found.batch_stats['conv1']['bn']
  np.testing.assert_allclose(stats['mean'], np.mean(means, 0), rtol=1e-9)
  np.testing.assert_allclose(stats['var'], np.mean(variances, 0), rtol=1e-9)


def test_population_batches_are_those_of_the_first_steps():
  """Distortion and dropout are drawn from the step of the state."""
  experiment, state = trained()
  steps, images = [], []

  def statistics_step(state, batch):
    steps.append(int(state.step))
    images.append(np.asarray(batch['image']))
    return experiment.steps.statistics_step(state, batch)

  evaluation.inference_state(
    dataclasses.replace(
      experiment,
      steps=experiment.steps._replace(statistics_step=statistics_step),
    ),
    state,
    evaluation.POPULATION,
    never_stop,
  )
  assert steps == [0, 1, 2, 3]
  for found, batch in zip(images, experiment.train_batches(0, 4), strict=True):
    np.testing.assert_array_equal(found, batch['image'])


def test_population_statistics_leave_the_rest_alone():
  experiment, state = trained()
  before = jax.device_get(state)
  found = evaluation.inference_state(
    experiment, state, evaluation.POPULATION, never_stop
  )
  for name in ('step', 'seed', 'params', 'opt_state', 'batch_stats'):
    jax.tree.map(
      np.testing.assert_array_equal,
      jax.device_get(getattr(state, name)),
      getattr(before, name),
    )
  jax.tree.map(np.testing.assert_array_equal, found.params, before.params)
  moving = jax.tree.leaves(before.batch_stats)
  population = jax.tree.leaves(jax.device_get(found.batch_stats))
  assert not any(map(np.array_equal, moving, population))


def test_inference_equals_training_on_a_batch_of_those_statistics(x64):
  """With the statistics of one batch, biased again, both give its logits."""
  experiment, state = trained('model.dtype=float64', 'model.dropout_rate=0')
  batch = next(experiment.train_batches(3, 4))
  statistics = jax.device_get(experiment.steps.statistics_step(state, batch))
  images = preprocess.normalize(
    jax.device_get(batch['image']), np.float64, 'symmetric'
  )
  config = experiment.config
  model = factory.create_model(
    config.model, config.bn, 10, axis_name=None, unbiased=False, momentum=0.0
  )
  params = jax.device_get(state.params)
  trained_logits, updated = model.apply(
    {'params': params, 'batch_stats': statistics},
    images,
    train=True,
    mutable=['batch_stats'],
  )
  inferred = model.apply({'params': params, **updated}, images, train=False)
  np.testing.assert_allclose(
    inferred.main, trained_logits.main, rtol=1e-9, atol=1e-12
  )
  # The unbiased ones are larger by m' / (m' - 1), here 32 * 16 * 16.
  m = 32 * 16 * 16
  np.testing.assert_allclose(
    statistics['conv1']['bn']['var'],
    updated['batch_stats']['conv1']['bn']['var'] * m / (m - 1),
    rtol=1e-9,
  )


@pytest.mark.parametrize(
  'variant, overrides, modes',
  [
    ('inception', (), (None,)),
    ('bn_x5', (), ('moving', 'population')),
    ('bn_x5', ('bn.population_batches=0',), ('moving',)),
    ('bn_x5', ('optim.polyak_decay=0.9',), ('population',)),
    ('inception', ('optim.polyak_decay=0.9',), (None,)),
  ],
)
def test_statistics_modes(variant, overrides, modes):
  config = config_lib.load(f'configs/{variant}.py:mini', overrides)
  experiment = create_experiment(config, datasets.check(config))
  assert evaluation.statistics_modes(experiment) == modes
