"""The shipped configs are complete, short diffs, and read in full."""

import ast
from pathlib import Path

import jax
from ml_collections import ConfigDict
import pytest
import written_imagenet

from bn_repro import config as config_lib
from bn_repro import paper
from bn_repro.config_fields import FIELDS, flatten
from bn_repro.data import datasets
from bn_repro.errors import UserError
from bn_repro.models import factory, inception_table, layers
from bn_repro.runtime import workdir as workdir_lib
from bn_repro.runtime.preemption import Preemption
from bn_repro.training import optimizer, train

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs'
NAMES = sorted(
  str(path.relative_to(CONFIGS).with_suffix(''))
  for path in (*CONFIGS.glob('*.py'), *CONFIGS.glob('ensemble/*.py'))
  if path.stem != '__init__'
)
# The fields that users' scripts rely on.
CONTRACT = """
seed batch_size total_steps total_epochs eval_every checkpoint_every log_every
eval_split data.name data.data_dir data.shuffle data.distortion
model.nonlinearity model.dropout_rate model.lrn model.reading model.stem
model.aux_head model.width bn.enabled bn.statistics bn.virtual_batch_size
bn.momentum bn.epsilon optim.learning_rate optim.momentum optim.weight_decay
optim.decay_rate optim.decay_epochs
"""


def load(name, mode, *overrides):
  return config_lib.load(f'{ROOT}/configs/{name}.py:{mode}', overrides)


@pytest.mark.parametrize('mode', config_lib.MODES)
@pytest.mark.parametrize('name', NAMES)
def test_complete_and_locked(name, mode):
  config = load(name, mode)
  fields = flatten(config)
  assert fields.keys() >= set(CONTRACT.split())
  assert fields.keys() == FIELDS.keys()
  with pytest.raises(AttributeError):
    _ = config.no_such_field
  with pytest.raises(AttributeError):
    config.optim.new_field = 1


SECTION_421 = {
  'optim.learning_rate': 0.0075,
  'model.dropout_rate': 0.0,
  'optim.weight_decay': 4e-5,
  'optim.decay_rate': 0.94,
  'optim.decay_epochs': 2.0,
  'model.lrn': False,
  'data.shuffle': 'within_shard',
  'data.distortion': 'reduced',
}
SIGMOID = {'model.nonlinearity': 'sigmoid'}
# In `mini` all networks but Inception train 500 steps.
SHORTER = {'total_steps': 500}


@pytest.mark.parametrize(
  'name, parent, full, mini',
  [
    (
      'bn_baseline',
      'inception',
      {'bn.enabled': True, 'total_steps': 15_000_000},
      {'bn.enabled': True, **SHORTER},
    ),
    (
      'bn_x5',
      'bn_baseline',
      {**SECTION_421, 'total_steps': 6_000_000},
      {
        'optim.learning_rate': 0.1,
        'model.dropout_rate': 0.0,
        'optim.weight_decay': 4e-5,
        'optim.decay_epochs': 0.16,
        'model.lrn': False,
        'data.shuffle': 'within_shard',
      },
    ),
    (
      'bn_x30',
      'bn_x5',
      {'optim.learning_rate': 0.045},
      {'optim.learning_rate': 0.6},
    ),
    ('bn_x5_sigmoid', 'bn_x5', SIGMOID, SIGMOID),
    (
      'inception_x5',
      'inception',
      {'optim.learning_rate': 0.0075},
      {'optim.learning_rate': 0.1, **SHORTER},
    ),
    ('inception_sigmoid', 'inception', SIGMOID, {**SIGMOID, **SHORTER}),
    ('bn_mnist', 'mnist', {'bn.enabled': True}, {'bn.enabled': True}),
  ],
)
def test_differs_from_its_parent_in_the_paper_s_list(name, parent, full, mini):
  for mode, expected in (('full', full), ('mini', mini)):
    ours = flatten(load(name, mode))
    theirs = flatten(load(parent, mode))
    changed = {key: ours[key] for key in ours if ours[key] != theirs[key]}
    assert changed.keys() == expected.keys()
    for key, value in expected.items():
      assert changed[key] == (
        pytest.approx(value) if isinstance(value, float) else value
      )


# Section 4.2.3: the members, and the changes that the paper names.
DROPOUT_5, DROPOUT_10 = ({'model.dropout_rate': rate} for rate in (0.05, 0.1))
LARGER = {'model.init_scale': 2.0}
PER_ACTIVATION = {'bn.per_activation': True}
MEMBERS = {
  'dropout_5': DROPOUT_5,
  'dropout_10': DROPOUT_10,
  'init_2': LARGER,
  'per_activation': PER_ACTIVATION,
  'init_2_dropout_5': LARGER | DROPOUT_5,
  'per_activation_dropout_10': PER_ACTIVATION | DROPOUT_10,
}


@pytest.mark.parametrize('mode', config_lib.MODES)
def test_members_of_the_ensemble(mode):
  """BN-x30 with some of the changes of section 4.2.3, and a seed of its own."""
  assert list(paper.ENSEMBLE) == list(MEMBERS)
  names = {name.partition('/')[2] for name in NAMES if '/' in name}
  assert names == MEMBERS.keys()
  theirs = flatten(load('bn_x30', mode))
  seeds = [theirs['seed']]
  for name, changes in MEMBERS.items():
    ours = flatten(load(f'ensemble/{name}', mode))
    seeds.append(ours['seed'])
    assert ours == {**theirs, **changes, 'seed': ours['seed']}
  assert len(set(seeds)) == 7


def test_paper_values_of_inception():
  fields = flatten(load('inception', 'full'))
  expected = {
    'batch_size': 32,
    'total_steps': 31_000_000,
    'optim.learning_rate': 0.0015,
    'optim.momentum': 0.9,
    'optim.weight_decay': 2e-4,
    'optim.decay_rate': 0.96,
    'optim.decay_epochs': 8.0,
    'model.dropout_rate': 0.4,
    'model.lrn': True,
    'data.shuffle': 'none',
    'data.distortion': 'full',
    'bn.momentum': 0.9997,
    'bn.epsilon': 1e-3,
  }
  assert {key: fields[key] for key in expected} == expected


@pytest.mark.parametrize(
  'epoch, rate', [(0, 0.045), (2, 0.0423), (150, 4.34e-4)]
)
def test_learning_rates_of_bn_x30(epoch, rate):
  config = load('bn_x30', 'full')
  steps_per_epoch = 1_281_167 / 32
  schedule = optimizer.create_schedule(config.optim, steps_per_epoch)
  step = round(epoch * steps_per_epoch + 0.5)
  assert float(schedule(step)) * config.optim.learning_rate == pytest.approx(
    rate, rel=2e-3
  )


class Recording:
  """Stands for a config, and records which fields are read."""

  def __init__(self, config, read, at=''):
    self._config, self._read, self._at = config, read, at

  def __getattr__(self, name):
    value = getattr(self._config, name)
    if isinstance(value, ConfigDict):
      return Recording(value, self._read, f'{self._at}{name}.')
    self._read.add(self._at + name)
    return value


TINY = ('model.name=inception_tiny', 'bn.population_batches=1')


def test_every_field_is_read(tmp_path, monkeypatch):
  """By the program, not by validation or by writing `config.json`."""
  # One module is enough, and the auxiliary head follows it.
  monkeypatch.setattr(inception_table, 'TINY', ('3a',))
  monkeypatch.setattr(inception_table, 'AUX_HEAD_AFTER', '3a')
  monkeypatch.setattr(config_lib, 'digest', lambda config: 'digest')
  monkeypatch.setattr(
    workdir_lib.Workdir, 'write_config', lambda workdir, config: None
  )
  read = set()
  for number, overrides in enumerate(
    (
      ('total_steps=1', 'bn.statistics=group', 'bn.virtual_batch_size=4'),
      ('total_steps=0', 'total_epochs=0.001', 'model.aux_head=true'),
    )
  ):
    config = Recording(load('bn_baseline', 'mini', *TINY, *overrides), read)
    workdir = workdir_lib.Workdir(tmp_path / str(number))
    workdir.claim()
    train.train_and_evaluate(
      config,
      datasets.load(config.data, config.seed),
      workdir,
      Preemption(),
      'test',
    )
    workdir.release()
  elsewhere = load('inception', 'mini', 'data.name=mnist', 'data.data_dir=/no')
  with pytest.raises(UserError, match='/no'):
    datasets.load(Recording(elsewhere, read).data, 0)
  written_imagenet.write(tmp_path, written_imagenet.examples())
  stand_in = ('data.name=imagenet_stand_in', f'data.data_dir={tmp_path}')
  imagenet = Recording(load('inception', 'full', *stand_in), read)
  assert len(datasets.load(imagenet.data, 0).splits['train']) == 40
  assert set(FIELDS) - read == set()


def test_no_hidden_defaults():
  """No `.get(key, default)` and no `getattr` on a config."""
  for path in (ROOT / 'bn_repro').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if not isinstance(node, ast.Call):
        continue
      of = None
      if isinstance(node.func, ast.Attribute) and node.func.attr == 'get':
        of = node.func.value
      elif isinstance(node.func, ast.Name) and node.func.id == 'getattr':
        of = node.args[0]
      name = ast.unparse(of).split('.')[-1] if of else ''
      is_config = name in ('config', '_config', 'data', 'model', 'bn', 'optim')
      assert not is_config, f'{path}:{node.lineno}'


def test_full_without_data():
  with pytest.raises(UserError, match='imagenet2012'):
    datasets.check(load('bn_x5', 'full'))


def test_tests_run_on_eight_devices():
  assert jax.device_count() == 8


@pytest.mark.parametrize(
  'platform, expected',
  [('cpu', 'float32'), ('gpu', 'bfloat16'), ('tpu', 'bfloat16')],
)
def test_compute_type_of_a_platform(platform, expected, monkeypatch):
  model = load('bn_x5', 'full').model
  assert model.dtype == 'auto'
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  assert str(factory.compute_dtype(model)) == expected
  # Parameters are never below float32.
  assert str(layers.parameter_dtype(factory.compute_dtype(model))) == 'float32'
  chosen = load('bn_x5', 'full', 'model.dtype=float64').model
  assert str(factory.compute_dtype(chosen)) == 'float64'
