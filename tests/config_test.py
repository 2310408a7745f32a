"""Loading, overriding, checking and comparing configs."""

import argparse
import json
from pathlib import Path
import re
from types import SimpleNamespace

import pytest

from bn_repro import cli
from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.models import batch_norm

ROOT = Path(__file__).resolve().parent.parent
SPEC = f'{ROOT}/configs/bn_x5.py:mini'


def load(*overrides):
  return config_lib.load(SPEC, overrides)


def problems(*overrides, spec=SPEC):
  with pytest.raises(UserError) as caught:
    config_lib.load(spec, overrides)
  found = caught.value.problems
  assert all('\n' not in problem for problem in found)
  return list(found)


def own_config(tmp_path, body):
  """A config file of a user's, which changes that of BN-x5."""
  path = tmp_path / 'own.py'
  path.write_text(
    'from configs import bn_x5\n\n\n'
    'def get_config(mode):\n'
    '  config = bn_x5.get_config(mode)\n'
    f'  {body}\n'
    '  return config\n'
  )
  return str(path)


@pytest.mark.parametrize(
  'assignment, expected',
  [
    ('seed=7', 7),
    ('total_epochs=1.5', 1.5),
    ('optim.learning_rate=2', 2.0),
    ('optim.weight_decay=1e-4', 1e-4),
    ('model.lrn=true', True),
    ('model.lrn=1', True),
    ('bn.enabled=False', False),
    ('bn.enabled=0', False),
    ('model.nonlinearity=sigmoid', 'sigmoid'),
    ('data.data_dir=a=b', 'a=b'),
    ('data.data_dir=', ''),
  ],
)
def test_overrides(assignment, expected):
  name = assignment.partition('=')[0]
  others = ('total_steps=0',) if name == 'total_epochs' else ()
  before = config_lib.flatten(load())
  after = config_lib.flatten(load(assignment, *others))
  assert after[name] == expected
  assert type(after[name]) is type(expected)
  changed = {key for key in before if before[key] != after[key]}
  assert changed <= {name, 'total_steps'}


def test_last_override_wins():
  assert load('seed=1', 'seed=2').seed == 2


def test_mode():
  path = SPEC.removesuffix(':mini')
  assert config_lib.load(path) == config_lib.load(f'{path}:full')
  assert config_lib.load(path).total_steps != load().total_steps
  (problem,) = problems(spec=f'{path}:tiny')
  assert "no mode 'tiny'" in problem and 'full and mini' in problem


@pytest.mark.parametrize(
  'assignment, expected',
  [
    ('optim.lerning_rate=1', "Did you mean 'optim.learning_rate'?"),
    ('batchsize=1', "Did you mean 'batch_size'?"),
    ('model=1', 'no such field'),
    ('bn=1', 'no such field'),
    ('seed', 'give it a value'),
    ('seed=1.5', "'1.5' is not a whole number"),
    ('seed=', "'' is not a whole number"),
    ('model.width=wide', "'wide' is not a number"),
    ('bn.enabled=yes', "'yes' is not true or false"),
  ],
)
def test_overrides_that_cannot_be_taken(assignment, expected):
  (problem,) = problems(assignment)
  assert problem.startswith(f'--config.{assignment.partition("=")[0]}')
  assert expected in problem


# For each field an outermost value that is taken, and one just past it. Texts
# and booleans take any value, or one of a list.
BOUNDS = [
  ('seed', 0, -1),
  ('seed', 2**32 - 1, 2**32),
  ('batch_size', 1, 0),
  ('total_steps', 1, -1),
  ('steps_per_call', 1, 0),
  ('log_every', 1, 0),
  ('eval_every', 1, 0),
  ('checkpoint_every', 1, 0),
  ('checkpoints_to_keep', 1, 0),
  ('divergence_loss', 1e-9, 0),
  ('stuck_after', 0, -1),
  ('profile_steps', 0, -1),
  ('profile_first_step', 0, -1),
  ('data.image_size', 32, 31),
  ('data.holdout', 0, -1),
  ('data.num_threads', 0, -1),
  ('data.num_workers', 0, -1),
  ('data.max_replaced', 0, 1),
  ('data.num_shards', 1, 0),
  ('data.distorted_copies', 0, -1),
  ('model.init_std', 0, -0.1),
  ('model.init_scale', 0.1, 0),
  ('model.stem_kernel', 1, -1),
  ('model.stem_kernel', 3, 4),
  # Of 32 filters, the fewest in the table, exactly a half rounds to none.
  ('model.width', 0.0157, 0.015625),
  ('model.dropout_rate', 0, -0.1),
  ('model.dropout_rate', 0.99, 1),
  ('model.aux_loss_weight', 0, -0.1),
  ('bn.virtual_batch_size', 1, 0),
  ('bn.momentum', 0, -0.1),
  ('bn.momentum', 0.9999, 1),
  ('bn.epsilon', 1e-9, 0),
  ('bn.population_batches', 0, -1),
  ('optim.learning_rate', 1e-9, 0),
  ('optim.momentum', 0, -0.1),
  ('optim.momentum', 0.99, 1),
  ('optim.weight_decay', 0, -1e-9),
  ('optim.decay_rate', 1, 1.1),
  ('optim.decay_rate', 0.1, 0),
  ('optim.decay_epochs', 1e-3, 0),
  ('optim.polyak_decay', 0, -0.1),
  ('optim.polyak_decay', 0.99, 1),
]


@pytest.mark.parametrize('name, inside, outside', BOUNDS)
def test_bounds(name, inside, outside):
  load(f'{name}={inside}')
  (problem,) = problems(f'{name}={outside}')
  assert problem.startswith(f'config.{name}={outside}')


def test_every_number_has_bounds():
  numbers = {
    name for name, (kind, _) in config_lib.RULES.items() if kind in (int, float)
  }
  assert {name for name, *_ in BOUNDS} == numbers - {'total_epochs'}
  (problem,) = problems('total_steps=0', 'total_epochs=-1')
  assert 'at least 0' in problem


@pytest.mark.parametrize('value', ['nan', 'inf', '-inf'])
def test_numbers_are_finite(value):
  for name, (kind, _) in config_lib.RULES.items():
    if kind is float:
      assert any(
        problem.startswith(f'config.{name}={value}')
        for problem in problems(f'{name}={value}')
      ), name


@pytest.mark.parametrize(
  'name, choices',
  [
    ('eval_split', 'train validation test'),
    (
      'data.name',
      'mnist_5k mnist fashion_mnist imagenet2012 imagenet_stand_in synthetic',
    ),
    ('data.shuffle', 'none within_shard global'),
    ('data.distortion', 'none reduced full'),
    ('model.reading', '576 608'),
    ('model.stem', 'separable plain'),
    ('model.padding', 'same torch'),
    ('model.nonlinearity', 'relu sigmoid'),
    ('model.dtype', 'auto float32 bfloat16 float64'),
    ('bn.statistics', 'global device group'),
  ],
)
def test_choices(name, choices):
  for choice in choices.split():
    load(f'{name}={choice}')
  (problem,) = problems(f'{name}=other')
  assert problem.endswith(f'one of {", ".join(choices.split())}.')


@pytest.mark.parametrize(
  'overrides, expected',
  [
    (('total_epochs=2',), 'the other must be 0'),
    (('total_steps=0',), 'set one of them'),
    (
      ('bn.statistics=group', 'bn.virtual_batch_size=24'),
      'must divide config.batch_size=32',
    ),
    (
      ('bn.statistics=group', 'bn.virtual_batch_size=64'),
      'must divide config.batch_size=32',
    ),
    (
      ('optim.polyak_decay=0.9', 'bn.population_batches=0'),
      'averaged parameters need statistics of their own',
    ),
  ],
)
def test_fields_that_do_not_go_together(overrides, expected):
  (problem,) = problems(*overrides)
  assert expected in problem


def test_fields_that_go_together():
  load('bn.statistics=group', 'bn.virtual_batch_size=16')
  load('bn.virtual_batch_size=24')
  load('optim.polyak_decay=0.9', 'bn.population_batches=0', 'bn.enabled=false')


def test_all_problems_at_once():
  found = problems('sead=1', 'seed=x', 'batch_size=0', 'model.width=0')
  assert [re.split('[=:]', problem)[0] for problem in found] == [
    '--config.sead',
    '--config.seed',
    'config.batch_size',
    'config.model.width',
  ]


def test_missing_file_lists_what_there_is():
  (problem,) = problems(spec=f'{ROOT}/configs/bn_x6.py')
  for path in (ROOT / 'configs').glob('[a-z]*.py'):
    assert str(path) in problem
  assert '__init__' not in problem
  (problem,) = problems(spec='no/such/folder.py')
  assert problem == '--config=no/such/folder.py: no such file.'


@pytest.mark.parametrize(
  'text, expected',
  [
    ('def get_config(', 'SyntaxError'),
    ('1 / 0', 'ZeroDivisionError'),
    ('raise ValueError("one\\ntwo")', 'ValueError while loading it: one two'),
    ('def get_config(mode):\n  return mode.config', 'AttributeError'),
    ('def get_config(mode, size):\n  return mode', 'TypeError'),
    ('x = 1', 'defines no get_config(mode)'),
    ('get_config = 1', 'defines no get_config(mode)'),
    ('def get_config():\n  return 1', 'defines no get_config(mode)'),
    ('def get_config(mode):\n  return {}', 'must return a ConfigDict'),
  ],
)
def test_broken_files(text, expected, tmp_path):
  path = tmp_path / 'own.py'
  path.write_text(text)
  (problem,) = problems(spec=str(path))
  assert problem.startswith(f'--config={path}: ')
  assert expected in problem


@pytest.mark.parametrize(
  'body, expected',
  [
    ('config.modle.width = 1.0', 'modle'),
    ('config.optim.nesterov = True', 'optim.nesterov: no such field'),
    ('del config.bn.momentum', 'bn.momentum: the field is missing'),
    ('config.init_from = None', 'init_from=None: must be a text'),
    (
      'del config.seed; config.seed = 1.0',
      'seed=1.0: must be a whole number',
    ),
  ],
)
def test_files_whose_fields_do_not_fit(body, expected, tmp_path):
  (problem,) = problems('init_from=x', spec=own_config(tmp_path, body))
  assert expected in problem


def test_own_file(tmp_path):
  spec = own_config(tmp_path, 'config.optim.learning_rate *= 2')
  config = config_lib.load(f'{spec}:mini', ['seed=3'])
  assert config.optim.learning_rate == 2 * load().optim.learning_rate
  assert config.seed == 3


def parse(*arguments):
  parser = cli.Parser(allow_abbrev=False)
  cli.add_config_arguments(parser)
  parser.add_argument('--workdir', required=True)
  return cli.parse_arguments(arguments, parser)


@pytest.mark.parametrize(
  'arguments',
  [
    ('--config=c.py', '--workdir=w', '--config.seed=1', '--config.a.b=x=y'),
    ('--config', 'c.py', '--config.seed', '1', '--workdir', 'w')
    + ('--config.a.b', 'x=y'),
    ('--config.seed', '1', '--config.a.b=x=y', '--config=c.py', '--workdir=w'),
  ],
)
def test_arguments(arguments):
  flags, overrides = parse(*arguments)
  assert flags.config == 'c.py' and flags.workdir == 'w'
  assert overrides == ['seed=1', 'a.b=x=y']


def test_negative_and_empty_values_are_values():
  _, overrides = parse(
    *('--config=c', '--workdir=w', '--config.seed', '-1'),
    *('--config.data.data_dir', ''),
  )
  assert overrides == ['seed=-1', 'data.data_dir=']


@pytest.mark.parametrize(
  'arguments, expected',
  [
    (('--config=c',), '--workdir'),
    (('--workdir=w',), '--config'),
    (('--config=c', '--workdir=w', '--sped=1'), '--sped=1'),
    (('--config=c', '--work=w'), '--work'),
    (('--config=c', '--workdir=w', 'more'), 'more'),
    (('--config=c', '--workdir'), 'expected one argument'),
  ],
)
def test_arguments_that_are_refused(arguments, expected):
  with pytest.raises(UserError) as caught:
    parse(*arguments)
  (problem,) = caught.value.problems
  assert expected in problem and problem.endswith('Try --help.')


def test_errors_are_a_line_each(capsys):
  assert cli.report_errors(['one', 'two']) == 1
  assert capsys.readouterr().err == 'error: one\nerror: two\n'


def other_value(name, value):
  """An override that changes a field to something it may be."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, int):
    return value + 2
  if isinstance(value, float):
    return (value or 0.1) * 0.99
  choices = {
    'model.name': 'mlp',
    'eval_split': 'test',
    'data.name': 'mnist',
    'data.shuffle': 'global',
    'data.distortion': 'full',
    'model.reading': '608',
    'model.stem': 'separable',
    'model.padding': 'torch',
    'model.nonlinearity': 'sigmoid',
    'model.dtype': 'bfloat16',
    'bn.statistics': 'device',
  }
  return choices.get(name, 'other')


def test_intervals_are_multiples_of_the_steps_per_call():
  found = problems('steps_per_call=10', 'total_steps=505', 'log_every=7')
  assert [problem.split(':')[0] for problem in found] == [
    'config.total_steps=505',
    'config.log_every=7',
    'config.eval_every=25',
  ]
  assert all('multiple of config.steps_per_call=10' in p for p in found)


def test_steps_from_epochs_fill_the_last_call():
  config = load('total_steps=0', 'total_epochs=0.1', 'steps_per_call=5')
  # 400 of 4,000 images are 12.5 batches of 32.
  assert config_lib.total_steps(config, 4000) == 15


def test_devices_that_cannot_share_groups():
  config = load(
    'batch_size=12', 'bn.statistics=group', 'bn.virtual_batch_size=4'
  )
  with pytest.raises(UserError) as caught:
    config_lib.check_divides(config, 2)
  (problem,) = caught.value.problems
  assert problem.startswith('config.bn.virtual_batch_size=4: ')
  assert 'the 6 images of each of 2 devices' in problem
  assert problem.endswith('Use one of [2, 3, 6, 12].')


def fits_layer(num_devices, share, group):
  """Whether a layer itself takes groups of that size."""
  layer = SimpleNamespace(
    is_initializing=lambda: False,
    virtual_batch_size=group,
    axis_name='data',
    axis_index_groups=None,
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batch_norm.lax, 'axis_size', lambda name: num_devices)
    try:
      batch_norm.BatchNorm._sharing(layer, (share, 1), (0,))
    except ValueError:
      return False
  return True


@pytest.mark.parametrize('num_devices', range(1, 9))
def test_groups_fit_as_the_layers_have_it(num_devices):
  """So do all sizes that a refusal names, and no others."""
  for share in range(1, 9):
    batch_size = num_devices * share
    sizes = range(1, batch_size + 1)
    fit = [n for n in sizes if fits_layer(num_devices, share, n)]
    for size in sizes:
      config = SimpleNamespace(
        batch_size=batch_size,
        bn=SimpleNamespace(statistics='group', virtual_batch_size=size),
      )
      if size in fit:
        config_lib.check_divides(config, num_devices)
        continue
      with pytest.raises(UserError) as caught:
        config_lib.check_divides(config, num_devices)
      (problem,) = caught.value.problems
      # One image has no variance of its own in the last layers.
      assert problem.endswith(f'Use one of {[n for n in fit if n > 1]}.')


def test_networks_have_what_they_are_asked_for():
  found = problems('model.name=mlp', 'model.aux_head=true', 'model.lrn=true')
  assert {problem.split('=')[0] for problem in found} == {
    'config.model.aux_head',
    'config.model.lrn',
  }
  plain = ('model.name=mlp', 'model.lrn=false')
  (found,) = problems(*plain, 'data.distortion=full')
  assert 'takes images as they are' in found
  (found,) = problems('data.image_size=31')
  assert 'takes 32 pixels and up' in found


# What a user may change on the way: no step that was taken depends on it.
CHANGEABLE = {
  'total_steps',
  'total_epochs',
  'log_every',
  'eval_every',
  'checkpoint_every',
  'checkpoints_to_keep',
  'stuck_after',
  'tensorboard',
  'profile_steps',
  'profile_first_step',
  'data.data_dir',
  'data.num_threads',
  'data.num_workers',
  'data.max_replaced',
}


# Changeable fields that have to change with another.
WITH = {
  'total_epochs': ('total_steps=0',),
  'steps_per_call': tuple(
    f'{name}=3'
    for name in ('total_steps', 'log_every', 'eval_every', 'checkpoint_every')
  ),
}


@pytest.mark.parametrize('name', config_lib.RULES)
def test_what_a_resumed_run_may_change(name):
  config = load()
  value = other_value(name, config_lib.flatten(config)[name])
  others = WITH.get(name, ())
  changed = load(f'{name}={value}', *others)
  saved = json.loads(config_lib.to_json(config))
  differences = config_lib.differences(saved, changed)
  same_run = config_lib.digest(config) == config_lib.digest(changed)
  assert same_run == (name in CHANGEABLE)
  if name in CHANGEABLE:
    assert differences == []
  else:
    (difference,) = differences
    old = config_lib.flatten(config)[name]
    new = config_lib.flatten(changed)[name]
    assert new != old
    assert difference == f'{name}: {old} -> {new}'


def test_differences_of_other_versions():
  saved = load().to_dict()
  del saved['bn']['momentum']
  saved['bn']['decay'] = 0.9
  assert config_lib.differences(saved, load()) == [
    'bn.decay: 0.9 -> (none)',
    'bn.momentum: (none) -> 0.9',
  ]


def test_digest_is_of_values():
  assert config_lib.digest(load()) == config_lib.digest(load())
  assert re.fullmatch('[0-9a-f]{16}', config_lib.digest(load()))
  assert config_lib.digest(load('seed=0')) == config_lib.digest(load())


def test_json_and_back():
  config = load('optim.weight_decay=0', 'seed=4')
  saved = json.loads(config_lib.to_json(config))
  again = config_lib.from_json(saved, 'w/config.json')
  assert config_lib.flatten(again) == config_lib.flatten(config)
  assert config_lib.digest(again) == config_lib.digest(config)
  with pytest.raises(AttributeError):
    again.seeds = 1


@pytest.mark.parametrize(
  'change, expected',
  [
    ({'seed': 'x'}, 'seed=x: must be a whole number'),
    ({'seed': -1}, 'seed=-1: must be at least 0'),
    ({'sead': 1}, 'sead: no such field'),
    ({'bn': {}}, 'bn.momentum: the field is missing'),
  ],
)
def test_json_of_another_version(change, expected):
  saved = load().to_dict() | change
  with pytest.raises(UserError) as caught:
    config_lib.from_json(saved, 'w/config.json')
  assert all(p.startswith('w/config.json: ') for p in caught.value.problems)
  assert any(expected in problem for problem in caught.value.problems)


def test_total_steps():
  assert config_lib.total_steps(load('total_steps=9'), 4000) == 9

  def after(epochs):
    config = load('total_steps=0', f'total_epochs={epochs}')
    return config_lib.total_steps(config, 4000)

  assert after(2) == 250
  assert after(0.001) == 1
  # A step under way at the end of the last epoch is taken.
  assert after(1.001) == 126


def test_help_names_its_flags():
  parser = argparse.ArgumentParser()
  cli.add_config_arguments(parser)
  assert '--config FILE[:MODE]' in parser.format_help()
  assert '--config.KEY VALUE' in parser.format_help()
