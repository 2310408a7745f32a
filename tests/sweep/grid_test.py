"""What sweeps expand into, and which mistakes are refused."""

from pathlib import Path
import sys
import types

import numpy as np
import pytest

from bn_repro import config as config_lib
from bn_repro import paper
from bn_repro.errors import UserError
from bn_repro.sweep import grid
from bn_repro.training import optimizer

SWEEPS = sorted(
  path.stem
  for path in Path('configs/sweeps').glob('*.py')
  if path.stem != '__init__'
)

# A sweep whose parts a test replaces.
OWN = """
import dataclasses
import numpy as np
from configs.sweeps import lr_multipliers
from bn_repro.sweep.sweep import Sweep

def trial(base, variant, multiplier, seed):
  config = base({base!r})
  {assign}
  return {returned}

def get_sweep(mode):
  sweep = dataclasses.replace(lr_multipliers.get_sweep(mode), trial=trial)
  sweep.axes.update({axes})
  return dataclasses.replace(sweep, {fields})
"""
USUAL = {
  'base': 'inception',
  'assign': 'config.seed = 7 * seed + multiplier; config.bn.enabled = '
  'variant != "inception"',
  'returned': 'config',
  'axes': '{}',
  'fields': '',
}


def load(name='lr_multipliers', *axes, mode='mini', **options):
  return grid.load(f'configs/sweeps/{name}.py:{mode}', axes, **options)


def own(tmp_path, **parts):
  path = tmp_path / 'own.py'
  path.write_text(OWN.format(**{**USUAL, **parts}))
  return str(path)


def problems(*arguments, **options):
  with pytest.raises(UserError) as raised:
    load(*arguments, **options)
  return raised.value.problems


def by_name(sweep):
  return {trial.name: trial for trial in sweep.trials}


@pytest.mark.parametrize('mode', config_lib.MODES)
@pytest.mark.parametrize('name', SWEEPS)
def test_shipped_sweeps(name, mode):
  """A trial's command, read as `main` reads it, gives the trial's config."""
  sweep = load(name, mode=mode)
  assert len(sweep.trials) == len(by_name(sweep)) >= 7
  for trial in sweep.trials:
    config = config_lib.load(trial.config_spec, trial.overrides)
    assert trial.config == config
    assert trial.total_steps == config.total_steps
    assert trial.images == config.total_steps * config.batch_size


def test_the_papers_multiples():
  """Exactly x1 to x60 of Inception's rate, with BN and without."""
  found = {
    (trial.values['variant'], trial.values['multiplier']): trial
    for trial in load().trials
    if trial.values['seed'] == 0
  }
  assert len(found) == 14
  for (variant, multiplier), trial in found.items():
    assert trial.config.optim.learning_rate == 0.02 * multiplier
    assert trial.config.bn.enabled == (variant == 'bn_baseline')
    # The command names what differs from the config file, and nothing else.
    rate = (f'optim.learning_rate={0.02 * multiplier}',)
    assert trial.overrides == (rate if multiplier > 1 else ())
  config = by_name(load(mode='full'))['bn_baseline_multiplier30_seed1'].config
  assert config.optim.learning_rate == pytest.approx(0.045)
  assert config.data.name == 'imagenet2012'
  assert config.seed == 1


def test_comparisons_are_complete_early():
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
    config, larger = trial.config, trial.values['larger']
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
    base = by_name(sweep)[trial.name.replace(f'r{larger}_', 'r1_')].config
    # Rates for batches of 32, decays in epochs: unchanged.
    assert config.optim == base.optim


def test_scales_of_the_initial_weights():
  found = {
    trial.values['scale']: trial.config
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
    return config_lib.flatten(trials[f'{name}_seed0'].config)

  ends = {name: fields(name) for name in ('bn_baseline', 'bn_x5')}
  # Section 4.2.1, item by item.
  items = {
    'higher_rate': {'optim.learning_rate'},
    'removal_of_dropout': {'model.dropout_rate'},
    'smaller_l2': {'optim.weight_decay'},
    'faster_decay': {'optim.decay_epochs'},
    'removal_of_lrn': {'model.lrn'},
    'better_shuffling': {'data.shuffle'},
  }
  if mode == 'full':
    items['faster_decay'] |= {'optim.decay_rate'}
    items['weaker_distortion'] = {'data.distortion'}
  for start, end, word in (
    ('bn_baseline', 'bn_x5', 'baseline_with'),
    ('bn_x5', 'bn_baseline', 'x5_without'),
  ):
    reached = dict(ends[start])
    for item, expected in items.items():
      changed = fields(f'{word}_{item}')
      differing = {n for n in changed if changed[n] != ends[start][n]}
      assert differing == expected
      reached |= {name: changed[name] for name in differing}
    assert reached == ends[end]


def test_members_of_the_ensemble():
  """Each is its config; repeated, each has a seed that no other has."""
  sweep = load('ensemble', 'seed=0,1')
  for name, trial in by_name(sweep).items():
    net = trial.values['net']
    spec = net if net == 'bn_x30' else f'ensemble/{net}'
    expected = config_lib.load(f'{spec}:mini')
    if name.endswith('_seed1'):
      expected = config_lib.override(expected, [f'seed={trial.config.seed}'])
    assert trial.config == expected
  seeds = sorted(trial.config.seed for trial in sweep.trials)
  assert seeds == list(range(14))


def test_values_from_the_command_line():
  """`--config.KEY` comes before the axes, and after the sweep's defaults."""
  sweep = load(
    'lr_multipliers',
    'seed=3',
    'multiplier=0.5,5',
    'variant=bn_x5',
    overrides=['total_steps=50', 'optim.learning_rate=0.1'],
  )
  assert {t.name: set(t.overrides) for t in sweep.trials} == {
    f'bn_x5_multiplier{multiplier}_seed3': {
      'total_steps=50',
      f'optim.learning_rate={rate}',
      'seed=3',
    }
    for multiplier, rate in (('0.5', 0.05), ('5', 0.5))
  }
  sweep = load('batch_size', 'larger=1,16', overrides=['total_steps=1024'])
  assert {trial.total_steps for trial in sweep.trials} == {1024, 64}


def test_another_base(tmp_path):
  """`base()` is the config of `--config`, in the sweep's mode by default."""
  path = own(tmp_path, base='')
  for spec, expected in (
    ('configs/bn_x30.py', 'configs/bn_x30.py:full'),
    ('configs/bn_x30.py:mini', 'configs/bn_x30.py:mini'),
  ):
    sweep = grid.load(f'{path}:full', config_spec=spec)
    assert {trial.config_spec for trial in sweep.trials} == {expected}
  with pytest.raises(UserError, match='--config: this sweep needs one'):
    grid.load(path)
  (problem,) = problems(config_spec='configs/bn_x5.py')
  assert 'configs/bn_x5.py:mini: no trial starts from it' in problem


@pytest.mark.parametrize('name', ['own', 'x:y', ':mini'])
def test_configs_of_ones_own(name, tmp_path):
  """`base(NAME)` looks beside the file of `--config`."""
  folder = tmp_path / name
  folder.mkdir()
  for name in ('a', 'b'):
    (folder / f'{name}.py').write_text(
      f'from configs.{"bn_x5" if name == "a" else "bn_x30"} import get_config'
    )
  sweep = load(
    'lr_multipliers', 'variant=a,b', config_spec=str(folder / 'a.py')
  )
  specs = {trial.config_spec for trial in sweep.trials}
  assert specs == {f'{folder}/a.py:mini', f'{folder}/b.py:mini'}


def test_a_package_of_the_user_named_configs(tmp_path, monkeypatch):
  """`trial` imports the shipped configs, as the file of the sweep does."""
  for name in [name for name in sys.modules if name.startswith('configs.')]:
    monkeypatch.delitem(sys.modules, name)
  package = types.ModuleType('configs')
  monkeypatch.setitem(sys.modules, 'configs', package)
  assign = f'{USUAL["assign"]}; from configs import bn_x5'
  assert grid.load(own(tmp_path, assign=assign)).trials
  assert sys.modules['configs'] is package


def test_from_another_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (first, *_) = grid.load('lr_multipliers').trials
  assert config_lib.load(first.config_spec, first.overrides).seed == 0


def test_durations_in_epochs():
  sweep = load(overrides=['total_steps=0', 'total_epochs=2'])
  # 3,500 images in batches of 32.
  assert sweep.trials[0].total_steps == 219


def test_all_problems_at_once():
  found = problems(
    'lr_multipliers',
    'sed=1',
    'multiplier=',
    'variant=../etc',
    overrides=['optim.lerning_rate=1', 'batch_size=0'],
  )
  expected = (
    '--sweep.sed: no such axis. The axes are variant, multiplier, seed.',
    '--sweep.multiplier: give it values, as --sweep.multiplier=1,2.',
    "--sweep.variant: axis variant: '../etc' becomes a part of file",
    '--config.optim.lerning_rate: no such field. Did you mean',
    'config.batch_size=0: must be at least 1. (trial inception_multiplier1_',
  )
  for line in expected:
    assert sum(problem.startswith(line) for problem in found) == 1, line
  assert len(found) == len(expected)


def test_fields_that_the_sweep_sets():
  (problem,) = problems(overrides=['seed=0', 'total_steps=100'])
  assert problem.startswith(
    '--config.seed: the sweep sets this field. Use --sweep.variant or '
  )
  # Some values of an axis set it, and others do not.
  found = problems('section_421', overrides=['model.dropout_rate=0.3'])
  assert any('--config.model.dropout_rate: the sweep sets' in p for p in found)


def test_a_problem_of_many_trials_is_reported_once():
  found = problems(overrides=['optim.lerning_rate=1', 'batch_size=0'])
  assert len(found) == 2
  for problem in found:
    assert problem.endswith('(trial inception_multiplier1_seed0 and 27 more)')


@pytest.mark.parametrize(
  'axis, expected',
  [
    ('multiplier=1,1.0', '2 trials have the same name: inception_multiplier1_'),
    ('seed=0,0', '2 trials have the same name'),
    ('variant=inception,nothing', '--config=nothing: neither a file nor a'),
    ('multiplier=0', 'config.optim.learning_rate=0.0: must be greater than 0'),
    # A text: infinity is not a value.
    ('multiplier=inf', "trial(): TypeError: can't multiply"),
    ('multiplier=many', "trial(): TypeError: can't multiply"),
    ('seed=-1', 'config.seed=-1: must be at least 0'),
    ('seed=1.5', 'trial(): TypeError'),
    ('seed', '--sweep.seed: give it values'),
    ('larger=3', 'total_steps=512 is not a multiple of 3. (trial inception_'),
    ('net=with_all', "no net 'with_all'. The nets are bn_baseline"),
  ],
)
def test_bad_values(axis, expected):
  sweeps = {'larger': 'batch_size', 'net': 'section_421'}
  name = sweeps.get(axis.partition('=')[0], 'lr_multipliers')
  found = problems(name, axis)
  assert any(expected in problem for problem in found), found


@pytest.mark.parametrize(
  'parts, expected',
  [
    ({'fields': 'color=1'}, "unexpected keyword argument 'color'"),
    ({'fields': 'x=1'}, 'x=1: no such axis.'),
    ({'fields': 'axes=["seed"]'}, 'axes: must be a dict.'),
    ({'axes': '{"seed": 3}'}, 'axis seed: must be a tuple of one or more'),
    ({'fields': 'x="rate"'}, 'x=rate: no such axis. The axes are variant,'),
    ({'fields': 'x="seed"'}, 'x=seed: is also `repeat`.'),
    ({'fields': 'trial=len'}, 'trial(): TypeError: len() takes no keyword'),
    ({'fields': 'defaults={"sed": 1}'}, '--config.sed: no such field'),
    ({'axes': '{"size": (1,)}'}, "unexpected keyword argument 'size'"),
    ({'axes': '{"seed": ()}'}, 'axis seed: must be a tuple of one or more'),
    ({'axes': '{"seed": ([1],)}'}, 'axis seed: [1] becomes a part of file'),
    ({'axes': '{"a/b": (1,)}'}, 'axis a/b: 1 becomes a part of file names'),
    (
      {'base': 'nothing'},
      '--config=nothing: neither a file nor a',
    ),
    ({'assign': 'config.sed = 1'}, 'trial(): AttributeError'),
    ({'assign': 'config.unlock().sed = 1'}, '--config.sed: no such field'),
    (
      {'assign': ''},
      '28 trials are the same run: inception_multiplier1_seed0, ',
    ),
    (
      {'assign': 'config.seed = seed'},
      '14 trials are the same run: inception_multiplier1_seed0, '
      'bn_baseline_multiplier1_seed0, ',
    ),
    ({'returned': 'None'}, 'must return a config that it got from base()'),
    ({'returned': 'config.copy_and_resolve_references()'}, 'it got from base'),
  ],
)
def test_broken_sweeps(parts, expected, tmp_path):
  with pytest.raises(UserError) as raised:
    grid.load(own(tmp_path, **parts))
  assert any(expected in problem for problem in raised.value.problems), (
    raised.value.problems
  )


def test_numbers_of_numpy(tmp_path):
  path = own(
    tmp_path,
    assign='config.optim.learning_rate *= multiplier; config.seed = seed',
    axes='{"variant": ("a",), "multiplier": tuple(np.geomspace(1, 4, 3))}',
  )
  names = [trial.name for trial in grid.load(path).trials]
  assert names[:3] == [f'a_multiplier{m}_seed0' for m in (1, 2, 4)]


def test_files():
  (problem,) = problems(config_spec='configs/none.py')
  assert '--config=configs/none.py: no such file.' in problem
  for spec, expected in (
    ('configs/sweeps/nothing.py', '--sweep=configs/sweeps/nothing.py: no such'),
    ('configs/sweeps/batch_size.py:mega', "no mode 'mega'"),
    ('configs/bn_x5.py', 'the file defines no get_sweep(mode)'),
  ):
    with pytest.raises(UserError) as raised:
      grid.load(spec)
    assert expected in raised.value.problems[0]


@pytest.mark.parametrize('variant', paper.FIG_3)
def test_the_digits_are_trained_as_in_mini(variant):
  """But for the seed, which is also the fold."""
  trial = by_name(load('mnist_5k'))[f'{variant}_seed2']
  mini = config_lib.load(f'{variant}:mini', ['seed=2', 'data.fold=2'])
  ours, theirs = config_lib.flatten(trial.config), config_lib.flatten(mini)
  rate = pytest.approx(theirs.pop('optim.learning_rate'))
  assert ours.pop('optim.learning_rate') == rate
  assert ours == theirs


@pytest.mark.parametrize('variant', paper.FIG_3)
def test_fashion_is_trained_at_the_same_fractions_of_a_run(variant):
  """Learning rates, over the fraction of the run, are those of the digits."""
  mini = config_lib.load(f'{variant}:mini')
  config = by_name(load('fashion_mnist'))[f'{variant}_seed0'].config
  for field in ('total_steps', 'log_every', 'eval_every', 'checkpoint_every'):
    assert config[field] == 6 * mini[field]
  assert config.data.holdout == 3000
  factors = [
    optimizer.create_schedule(c.optim, size / c.batch_size)(
      # Between the steps at which the rate falls.
      np.arange(0.0132, 1, 0.05) * c.total_steps
    )
    for c, size in ((mini, 3_500), (config, 57_000))
  ]
  np.testing.assert_allclose(*factors, rtol=1e-6)
  assert factors[0][-1] < 0.6


@pytest.mark.parametrize(
  'variant, last', [('inception', 0.23), ('bn_x30', 0.011)]
)
def test_last_learning_rates_of_mini(variant, last):
  """As `configs/inception.py` says."""
  config = config_lib.load(f'{variant}:mini')
  schedule = optimizer.create_schedule(config.optim, 3_500 / config.batch_size)
  assert schedule(config.total_steps - 1) == pytest.approx(last, rel=0.05)
