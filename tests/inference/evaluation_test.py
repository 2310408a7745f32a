"""`evaluate` on a model file, against the run's own evaluation."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from bn_repro import cli, config_fields, evaluate, parallel
from bn_repro import config as config_lib
from bn_repro.data import datasets, preprocess
from bn_repro.data.split import ArraySplit
from bn_repro.inference import crops, forward, multi_crop, probabilities
from bn_repro.models import factory
from bn_repro.runtime.workdir import Workdir
from bn_repro.training import evaluation, model_file
from bn_repro.training.experiment import create_experiment

# In one worker, so that the run is made once.
pytestmark = pytest.mark.xdist_group('inference')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run of three steps: its workdir, model file and lines of metrics.

  Its evaluation is that of training, on eight devices.
  """
  config = config_lib.load(
    'configs/bn_baseline.py:mini',
    (
      'model.name=inception_tiny',
      'bn.population_batches=4',
      'data.holdout=100',
    ),
  )
  dataset = datasets.check(config)
  experiment = create_experiment(config, dataset)
  state = parallel.replicate(experiment.mesh, experiment.initial_state())
  for batches in experiment.stacked_batches(0, 3):
    state, _ = experiment.steps.train_steps(state, batches)
  evaluated = list(
    evaluation.evaluate(
      experiment, state, {'population': ['validation', 'test']}, lambda: None
    )
  )
  _, inference = evaluated[0]
  workdir = Workdir(tmp_path_factory.mktemp('runs') / 'tiny')
  workdir.path.mkdir()
  model = model_file.ModelFile(
    variables=jax.device_get(
      {'params': inference.params, 'batch_stats': inference.batch_stats}
    ),
    config=config,
    label_names=dataset.label_names,
    image_shape=dataset.image_shape,
    unpadded_shape=dataset.unpadded_shape,
    facts={
      'statistics': 'population',
      'evaluation': {'step': 3},
      'data_fingerprint': dataset.fingerprint,
    },
  )
  model_file.write(workdir.model, model)
  return workdir.path, model, {line['split']: line for line, _ in evaluated}


_create_predict_anew = forward.create_predict
_predicts = {}


def _create_predict(model):
  """Networks are compiled once for all tests, for one device."""
  if model.digest not in _predicts:
    mesh = parallel.create_mesh(jax.devices()[:1])
    _predicts[model.digest] = _create_predict_anew(model, mesh)
  return _predicts[model.digest]


@pytest.fixture
def command(run, tmp_path, monkeypatch, capsys):
  """Returns a function that evaluates a copy of the run."""
  monkeypatch.setattr(cli, 'set_up_jax', lambda config: None)
  monkeypatch.setattr(forward, 'create_predict', _create_predict)
  path = tmp_path / 'tiny'
  shutil.copytree(run[0], path)

  def call(*flags):
    code = evaluate.main([f'--workdir={path}', *flags])
    return code, capsys.readouterr()

  call.path = path
  return call


@pytest.mark.parametrize('split, count', [('validation', 100), ('test', 1000)])
def test_one_crop_reproduces_the_evaluation_of_the_run(
  split, count, run, command
):
  """A workdir without checkpoints needs no flag for that."""
  expected = run[2][split]
  path = command.path / 'p.npz'
  code, said = command(f'--split={split}', f'--save_probabilities={path}')
  assert code == 0 and said.err == ''
  found = probabilities.read(path).metrics()
  for name in ('accuracy', 'top5_accuracy'):
    assert round(found[name] * count) == round(expected[name] * count)
  assert found['num_examples'] == expected['num_examples'] == count
  assert found['loss'] == pytest.approx(expected['loss'], rel=1e-5)
  lines = said.out.splitlines()
  assert lines[0] == (
    f'{command.path}/model.safetensors: step 3, population statistics'
  )
  assert lines[-1].startswith(
    f'step 3  {split}, population statistics: '
    f'accuracy {expected["accuracy"]:.4f}  '
    f'top-5 {expected["top5_accuracy"]:.4f}  loss '
  )
  assert lines[-1].endswith(f'({count} images)')
  code, alone = command(f'--split={split}')
  assert code == 0 and alone.out.splitlines()[-1] == lines[-1]


def test_ten_crops(run, command, monkeypatch):
  """The network outside the mesh, on the views of a few images."""
  code, said = command('--crops=10')
  path = command.path / 'probabilities' / 'validation-10.npz'
  assert code == 0
  assert '32x32 pixels, of images with shorter sides 37 (those' in said.out
  assert f'class probabilities: {path}\n' in said.out
  assert ', population statistics, 10 crops: accuracy' in said.out
  found = probabilities.read(path)
  split = datasets.check(run[1].config).splits['validation']
  np.testing.assert_array_equal(found.labels, split.labels)
  for index in (0, 17, 99):
    expected = plain_softmax(run[1], crops.views(split.images[index], 10, 32))
    np.testing.assert_allclose(
      found.probabilities[index], expected.mean(0), atol=1e-6
    )
  assert found.facts['model'] == 'tiny'
  assert found.facts['model_digest'] == run[1].digest
  # The second time the file is enough.
  monkeypatch.setattr(multi_crop, '_averages', None)
  code, again = command('--crops=10')
  assert code == 0
  assert again.out.splitlines()[-1] == said.out.splitlines()[-1]


def plain_softmax(model, images):
  network = factory.create_model(model.config.model, model.config.bn, 10)
  logits = network.apply(
    model.variables,
    preprocess.normalize(images, network.dtype, 'symmetric'),
    train=False,
  ).main
  powers = np.exp(np.asarray(logits, np.float64))
  return powers / powers.sum(1, keepdims=True)


def test_devices_share_any_batch(run):
  """Eight devices; a batch of 13 is padded to 16."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (13, 32, 32, 1), np.uint8)
  found = np.asarray(forward.create_predict(run[1])(images))
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, plain_softmax(run[1], images), atol=1e-6)


def test_caffe_s_preprocessing_is_used(run):
  config = config_lib.override(run[1].config, ['data.normalization=caffe'])
  model = dataclasses.replace(run[1], config=config)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
  found = np.asarray(forward.create_predict(model)(images))
  network = factory.create_model(config.model, config.bn, 10)
  bgr = images[..., ::-1] - np.float32([104, 117, 128])
  logits = network.apply(model.variables, bgr, train=False).main
  np.testing.assert_allclose(found, jax.nn.softmax(logits), atol=1e-6)


def test_other_data_are_named_by_their_fields(run, command):
  """Color patterns, on the network of gray digits."""
  code, said = command('--config.data.name=synthetic', '--split=test')
  assert code == 0
  assert 'color images are converted to gray' in said.out
  assert "label 0 is '0' in the network and 'pattern 0' in the data" in said.err
  config = config_lib.override(run[1].config, ['data.name=synthetic'])
  split = datasets.load(config.data, 0).splits['test']
  gray = crops.convert_channels(split.images, 1)
  correct = plain_softmax(run[1], gray).argmax(1) == split.labels
  assert f'accuracy {correct.mean():.4f} ' in said.out
  assert '(130 images)' in said.out


def relabel(monkeypatch, names):
  """Changes the labels of the digits, and so their fingerprint."""
  source = datasets.SOURCES['mnist_5k']

  def relabeled(data):
    dataset = source.load(data)
    test = dataset.splits['test']
    changed = ArraySplit(test.images, (test.labels + 1) % 10)
    return dataclasses.replace(
      dataset,
      label_names=names,
      splits={**dataset.splits, 'test': changed},
    )

  monkeypatch.setitem(
    datasets.SOURCES,
    'mnist_5k',
    dataclasses.replace(source, load=relabeled),
  )


def test_classes_in_another_order_are_refused(command, monkeypatch):
  relabel(monkeypatch, [str(i) for i in reversed(range(10))])
  code, said = command('--other_data', '--crops=1')
  assert code == 1 and said.err.count('\n') == 1
  assert 'classes of the network in another order (9, 8,' in said.err


def test_data_that_differ_are_asked_for(command, monkeypatch):
  relabel(monkeypatch, [str(i) for i in range(10)])
  # A field that a resumed run may change as well does not ask for other data.
  for flag in ('--crops=1', '--config.data.num_threads=2'):
    code, said = command(flag)
    assert code == 1 and said.err.count('\n') == 1
    assert 'fingerprint' in said.err and '--other_data' in said.err
  for flag in ('--other_data', '--config.data.holdout=90'):
    code, said = command('--split=test', flag)
    assert code == 0 and '(1000 images)' in said.out


def test_overlap_with_the_training_images(run, command):
  """100 of the images are held out of the training."""
  config = config_lib.override(run[1].config, ['data.fold=1'])
  held_out = datasets.check(run[1].config).splits['validation'].images
  unseen = sum(
    (held_out == image).all((1, 2, 3)).any()
    for image in datasets.check(config).splits['test'].images
  )
  for flags, expected in (
    (['--split=test'], '0 of 1000 '),
    (['--split=train'], '3900 of 3900 '),
    (['--config.data.holdout=500'], '400 of 500 '),
    (['--config.data.fold=1', '--split=test'], f'{1000 - unseen} of 1000 '),
  ):
    code, said = command('--overlap', *flags)
    assert code == 0
    assert f'\n{expected}images are training images as well\n' in said.out
  code, said = command('--overlap', '--config.data.name=synthetic')
  assert code == 1 and said.err.count('\n') == 2
  assert 'of mnist_5k, are stored in another form' in said.err


def test_a_model_from_before_there_were_folds(run, command):
  """Its test digits are unknown; those of a fold are other data."""
  config = run[1].config.copy_and_resolve_references()
  config.data.fold = config_fields.BEFORE_FOLDS
  facts = {**run[1].facts, 'data_fingerprint': 'e687b321'}
  model = dataclasses.replace(run[1], config=config, facts=facts)
  model_file.write(command.path / 'model.safetensors', model)
  for flags in (['--crops=1'], ['--config.data.fold=0', '--overlap']):
    code, said = command('--split=test', *flags)
    assert code == 1 and said.err.count('\n') == 1
    assert 'data.fold=-1: the split of a run from before' in said.err
  code, said = command('--split=test', '--config.data.fold=0')
  assert code == 0 and '(1000 images)' in said.out


def test_mistakes(run, command, monkeypatch):
  (command.path / 'x.npz').write_text('text')
  cases = {
    '--config.seed=1': '--config.seed: belongs to the trained network',
    '--config.data.image_size=64': '--config.data.image_size: belongs',
    '--config.data.nam=mnist': "Did you mean 'data.name'",
    '--crops=12': 'invalid choice',
    '--split=tests': 'mnist_5k has',
    '--save_probabilities=s3://x': 'must be a path',
    f'--save_probabilities={command.path}/x.npz': 'no npz archive',
  }
  for flag, expected in cases.items():
    code, said = command(flag)
    assert code == 1 and said.err.count('\n') == 1, flag
    assert expected in said.err, flag
  relabel(monkeypatch, [str(i) for i in range(12)])
  code, said = command('--other_data')
  assert code == 1
  assert 'the network has 10 classes, and the data have 12' in said.err
  (command.path / 'model.safetensors').unlink()
  code, said = command('--crops=10')
  assert code == 1 and 'model.safetensors: does not exist' in said.err
  assert sorted(path.name for path in command.path.iterdir()) == ['x.npz']


def test_a_stopped_command_says_that_it_resumes(command, monkeypatch):
  calls = []
  averages = multi_crop._averages

  def stopped(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return averages(*arguments)

  monkeypatch.setattr(multi_crop, '_averages', stopped)
  code, said = command('--crops=10')
  assert code == 75 and 'run the same command again' in said.err
  code, said = command('--crops=10')
  assert code == 0 and 'validation: resuming at image 8\n' in said.out
  # 100 images, four at a time.
  assert len(calls) == 25 + 1


def test_imported_weights_have_neither_step_nor_fingerprint(run, command):
  model = dataclasses.replace(run[1], facts={'statistics': 'moving'})
  model_file.write(command.path / 'model.safetensors', model)
  code, said = command('--split=test')
  assert code == 0
  assert 'weights without a step, moving statistics' in said.out
  assert said.out.splitlines()[-1].startswith('test, moving statistics: acc')
