"""Sweeps as configs: what they expand into, and what is refused."""

from pathlib import Path

import pytest

from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.sweep import grid

SWEEPS = sorted(
  path.stem
  for path in Path('configs/sweeps').glob('*.py')
  if path.stem != '__init__'
)

OWN = """
from ml_collections import ConfigDict
from configs.sweeps import lr_multipliers

def get_config(mode):
  sweep = lr_multipliers.get_config(mode)
  {}
  return sweep
"""


def load(name='lr_multipliers', *axes, mode='mini', **options):
  return grid.load(f'configs/sweeps/{name}.py:{mode}', axes, **options)


def own(tmp_path, *lines):
  path = tmp_path / 'own.py'
  path.write_text(OWN.format('\n  '.join(lines)))
  return grid.load(str(path))


def problems(*arguments, **options):
  with pytest.raises(UserError) as raised:
    load(*arguments, **options)
  return raised.value.problems


def by_name(sweep):
  return {trial.name: trial for trial in sweep.trials}


@pytest.mark.parametrize('mode', config_lib.MODES)
@pytest.mark.parametrize('name', SWEEPS)
def test_sweeps_that_come_with_it(name, mode):
  sweep = load(name, mode=mode)
  assert len(sweep.trials) == len(by_name(sweep)) > 20
  for trial in sweep.trials:
    # As `main` will read it.
    config = config_lib.load(trial.config_spec, trial.overrides)
    assert trial.config() == config
    assert trial.total_steps == config.total_steps
    assert trial.images == config.total_steps * config.batch_size


def test_the_papers_multiples():
  """Rates of x1 to x60 of Inception's, exactly, with BN and without."""
  found = {
    (trial.values['variant'], trial.values['multiplier']): trial.config()
    for trial in load().trials
    if trial.values['seed'] == 0
  }
  assert len(found) == 14
  for (variant, multiplier), config in found.items():
    assert config.optim.learning_rate == 0.02 * multiplier
    assert config.bn.enabled == (variant == 'bn_baseline')
  full = by_name(load(mode='full'))
  config = full['bn_baseline_multiplier30_seed1'].config()
  assert config.optim.learning_rate == pytest.approx(0.045)
  assert config.data.name == 'imagenet2012'
  assert config.seed == 1


def test_comparisons_are_whole_early():
  """Nets change fastest, seeds slowest."""
  names = [trial.name for trial in load().trials]
  assert names[:3] == [
    'inception_multiplier1_seed0',
    'bn_baseline_multiplier1_seed0',
    'inception_multiplier2_seed0',
  ]
  assert all(name.endswith('seed0') for name in names[:14])


def test_batches_see_as_many_images():
  sweep = load('batch_size')
  assert {trial.images for trial in sweep.trials} == {512 * 32}
  for trial in sweep.trials:
    config, larger = trial.config(), trial.values['larger']
    assert config.batch_size == 32 * larger
    found = {
      name: config[name] * config.batch_size
      for name in ('log_every', 'eval_every', 'checkpoint_every')
    }
    assert found == {
      'log_every': 32 * 32,
      'eval_every': 32 * 32,
      'checkpoint_every': 128 * 32,
    }
    base = by_name(sweep)[trial.name.replace(f'r{larger}_', 'r1_')].config()
    # In epochs, and for batches of 32: as they are.
    assert config.optim == base.optim


def test_scales_of_the_initial_weights():
  found = {
    trial.values['scale']: trial.config()
    for trial in load('init_scale').trials
    if trial.values['variant'] == 'inception' and trial.values['seed'] == 0
  }
  base = config_lib.flatten(found.pop(1.0))
  assert sorted(found) == [0.05, 0.2, 0.5, 2, 5, 20]
  for scale, config in found.items():
    assert config_lib.flatten(config) == {**base, 'model.init_scale': scale}


@pytest.mark.parametrize('mode', config_lib.MODES)
def test_items_of_section_421(mode):
  """All items together lead from BN-Baseline to BN-x5, and back."""
  trials = by_name(load('section_421', mode=mode))

  def fields(name):
    return config_lib.flatten(trials[f'{name}_seed0'].config())

  ends = {name: fields(name) for name in ('bn_baseline', 'bn_x5')}
  # Section 4.2.1, item by item.
  items = {
    'rate': {'optim.learning_rate'},
    'dropout': {'model.dropout_rate'},
    'l2': {'optim.weight_decay'},
    'decay': {'optim.decay_epochs'},
    'lrn': {'model.lrn'},
    'shuffle': {'data.shuffle'},
  }
  if mode == 'full':
    items['decay'] |= {'optim.decay_rate'}
    items['distortion'] = {'data.distortion'}
  for start, end, word in (
    ('bn_baseline', 'bn_x5', 'with'),
    ('bn_x5', 'bn_baseline', 'without'),
  ):
    reached = dict(ends[start])
    for item, expected in items.items():
      changed = fields(f'{word}_{item}')
      differing = {n for n in changed if changed[n] != ends[start][n]}
      assert differing == expected
      reached |= {name: changed[name] for name in differing}
    assert reached == ends[end]


def test_values_from_the_command_line():
  sweep = load(
    'lr_multipliers',
    'seed=3',
    'multiplier=0.5,5',
    'variant=bn_x5',
    'retries=4',
    config_overrides=['total_steps=50', 'optim.learning_rate=0.1'],
  )
  assert sweep.retries == 4
  assert {t.name: t.overrides for t in sweep.trials} == {
    'bn_x5_multiplier0.5_seed3': (
      'total_steps=50',
      'optim.learning_rate=0.05',
      'seed=3',
    ),
    'bn_x5_multiplier5_seed3': (
      'total_steps=50',
      'optim.learning_rate=0.5',
      'seed=3',
    ),
  }


def test_another_base(tmp_path):
  """In the sweep's mode, where it has none; of use where no axis names one."""
  lines = ('del sweep.axes.variant',)
  path = tmp_path / 'own.py'
  path.write_text(OWN.format('\n  '.join(lines)))
  for spec, expected in (
    ('configs/bn_x30.py', 'configs/bn_x30.py:full'),
    ('configs/bn_x30.py:mini', 'configs/bn_x30.py:mini'),
  ):
    sweep = grid.load(f'{path}:full', config_spec=spec)
    assert {trial.config_spec for trial in sweep.trials} == {expected}
  (problem,) = problems(config_spec='configs/bn_x5.py')
  assert problem.endswith(
    'the axis variant names their configs. Use --sweep.variant=...'
  )


def test_from_another_folder(tmp_path, monkeypatch):
  path = Path('configs/sweeps/lr_multipliers.py').resolve()
  monkeypatch.chdir(tmp_path)
  (first, *_) = grid.load(str(path)).trials
  assert config_lib.load(first.config_spec, first.overrides).seed == 0


def test_durations_in_epochs():
  sweep = load(config_overrides=['total_steps=0', 'total_epochs=2'])
  assert sweep.trials[0].total_steps == 250


def test_all_problems_at_once():
  found = problems(
    'lr_multipliers',
    'sed=1',
    'multiplier=',
    'variant=../etc',
    config_overrides=['optim.lerning_rate=1', 'batch_size=0', 'seed=2'],
    config_spec='configs/none.py:mini',
  )
  for expected in (
    '--sweep.sed: no such axis. There are',
    'sweep.axes.multiplier: has no values.',
    "sweep.axes.variant: '../etc' becomes a part of the names of folders",
    '--config.seed: the axis seed sets it. Use --sweep.seed=...',
    '--config=configs/none.py: no such file.',
  ):
    assert sum(problem.startswith(expected) for problem in found) == 1, expected


def test_a_problem_of_many_trials_is_told_once():
  found = problems(config_overrides=['optim.lerning_rate=1', 'batch_size=0'])
  assert len(found) == 2
  assert found[0].startswith('--config.optim.lerning_rate: no such field. Did')
  assert found[1].endswith('(trial inception_multiplier1_seed0 and 27 more)')


@pytest.mark.parametrize(
  'axis, expected',
  [
    ('multiplier=1,1.0', '2 trials have one name: inception_multiplier1_seed0'),
    ('seed=0,0', '2 trials have one name'),
    ('variant=inception,nothing', '--config=configs/nothing.py: no such file'),
    ('multiplier=0', 'config.optim.learning_rate=0.0: must be greater than 0'),
    ('multiplier=inf', 'config.optim.learning_rate=inf: must be a finite'),
    ('multiplier=many', '0.02 cannot be multiplied or divided by it'),
    ('seed=-1', 'config.seed=-1: must be at least 0'),
    ('seed', '--sweep.seed: give it values'),
    ('retries=-1', '--sweep.retries: no such axis'),
  ],
)
def test_bad_values(axis, expected):
  found = problems('lr_multipliers', axis)
  assert any(expected in problem for problem in found), found


def test_values_of_named_settings():
  sweep = load('section_421', 'net=bn_baseline,with_lrn')
  assert len(sweep.trials) == 4
  (problem,) = problems('section_421', 'net=with_everything')
  assert "no value 'with_everything'. There are bn_baseline" in problem


@pytest.mark.parametrize(
  'lines, expected',
  [
    (['del sweep.x'], 'sweep.x: the field is missing.'),
    (["sweep.colour = 'red'"], 'sweep.colour: no such field.'),
    (['sweep.retries = -1'], 'sweep.retries=-1: must be at least 0.'),
    (["sweep.x = 'rate'"], 'sweep.x=rate: no such axis'),
    (["sweep.x = 'seed'"], 'sweep.x=seed: is sweep.repeat as well.'),
    (
      ['del sweep.axes.seed', 'sweep.axes.seed = 1'],
      'axes.seed: must have `values` and `set`',
    ),
    (
      ['del sweep.axes.seed.set', "sweep.axes.seed.set = 'seed={}'"],
      '`set` a tuple or a ConfigDict',
    ),
    (["sweep.axes.seed.set = ('sed={}',)"], '--config.sed: no such field'),
    (['sweep.axes.seed.set = (1,)'], 'axes.seed: `set` must hold texts'),
    (['sweep.axes.seed.values = ([1],)'], 'values must be numbers or texts'),
    (['sweep.overrides = (1,)'], 'overrides: must hold texts'),
    (["sweep.axes.seed.set = ('seed',)"], "'seed': write it as key=value"),
    (["sweep.axes.seed.set = ('sed*={}',)"], 'config.sed*=0: no such field'),
    (
      ["sweep.axes.seed.set = ('seed=1',)"],
      '2 trials are the same run: inception_multiplier1_seed0, '
      'inception_multiplier1_seed1. So do 13 more groups.',
    ),
    (
      ["sweep.axes.multiplier.set = ('total_steps/={}',)"],
      'config.total_steps/=15: 500 becomes 33.3333, which is no whole number',
    ),
  ],
)
def test_broken_sweeps(lines, expected, tmp_path):
  with pytest.raises(UserError) as raised:
    own(tmp_path, *lines)
  assert any(expected in problem for problem in raised.value.problems)


def test_numbers_of_numpy(tmp_path):
  sweep = own(
    tmp_path,
    'import numpy as np',
    'sweep.axes.multiplier.values = tuple(np.geomspace(1, 4, 3))',
  )
  rates = {trial.config().optim.learning_rate for trial in sweep.trials}
  assert sorted(rates) == pytest.approx([0.02, 0.04, 0.08])


def test_files():
  for spec, expected in (
    ('configs/sweeps/nothing.py', '--sweep=configs/sweeps/nothing.py: no such'),
    ('configs/sweeps/batch_size.py:mega', "no mode 'mega'"),
    (
      'configs/bn_x5.py',
      'configs/bn_x5.py: sweep.config: the field is missing',
    ),
  ):
    with pytest.raises(UserError) as raised:
      grid.load(spec)
    assert expected in raised.value.problems[0]
