"""Loading, overriding, checking and comparing configs."""

import json
from pathlib import Path
import re
from types import SimpleNamespace

import pytest

from bn_repro import cli
from bn_repro import config as config_lib
from bn_repro.config_fields import FIELDS, flatten
from bn_repro.errors import UserError
from bn_repro.models import batch_norm

ROOT = Path(__file__).resolve().parent.parent
SPEC = f'{ROOT}/configs/bn_x5.py:mini'
# Of each config: its digest and its config.json, computed by that revision.
OLD_RUNS = json.loads(
  Path(__file__).with_name('configs_3a68ec7.json').read_text()
)


def load(*overrides):
  return config_lib.load(SPEC, overrides)


def problems(*overrides, spec=SPEC):
  with pytest.raises(UserError) as caught:
    config_lib.load(spec, overrides)
  found = caught.value.problems
  assert all('\n' not in problem for problem in found)
  return list(found)


def own_config(tmp_path, body):
  """Writes a user's config file, which changes BN-x5."""
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
  'spec, name, mode',
  [
    ('bn_x5', 'bn_x5', ''),
    ('bn_x5:mini', 'bn_x5', 'mini'),
    ('bn_x5:', 'bn_x5', ''),
    (':full', '', 'full'),
    ('a:b/c.py', 'a:b/c.py', ''),
    ('a:b/c.py:mini', 'a:b/c.py', 'mini'),
    ('/a:b/c:d.py', '/a:b/c:d.py', ''),
    ('c:d.py', 'c:d.py', ''),
    ('c:d.py:full', 'c:d.py', 'full'),
    ('a:b/c:mini', 'a:b/c', 'mini'),
  ],
)
def test_the_mode_comes_after_the_last_colon(spec, name, mode):
  assert config_lib.split_mode(spec) == (name, mode)


@pytest.mark.parametrize('folder', ['a:b', 'lr[0.1]', 'c d', ':mini'])
def test_a_config_in_a_folder_of_any_name(folder, tmp_path):
  (tmp_path / folder).mkdir()
  path = own_config(tmp_path / folder, 'config.seed = 9')
  full = config_lib.load(path)
  mini = config_lib.load(f'{path}:mini')
  assert full.seed == mini.seed == 9
  assert full.total_steps != mini.total_steps or full.batch_size != (
    mini.batch_size
  )
  assert problems(spec=f'{path}:medium') == [
    f"--config={path}:medium: no mode 'medium'. Modes are full and mini."
  ]


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
  before = flatten(load())
  after = flatten(load(assignment, *others))
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
    ('data.stand_in=true', "Did you mean 'data.name=imagenet_stand_in'?"),
    ('model=1', 'no such field'),
    ('bn=1', 'no such field'),
    ('seed', 'give it a value'),
    ('seed=1.5', "'1.5' is not a whole number"),
    ('seed=', "'' is not a whole number"),
    ('model.width=wide', "'wide' is not a number"),
    ('bn.enabled=yes', "'yes' is not true or false"),
  ],
)
def test_refused_overrides(assignment, expected):
  (problem,) = problems(assignment)
  assert problem.startswith(f'--config.{assignment.partition("=")[0]}')
  assert expected in problem


def bounds(names, *pairs):
  return [(name, *pair) for name in names.split() for pair in pairs]


# For each number an outermost value that is accepted, and one just past it.
BOUNDS = [
  *bounds('seed', (0, -1), (2**32 - 1, 2**32)),
  *bounds('batch_size steps_per_call log_every eval_every', (1, 0)),
  *bounds('checkpoint_every checkpoints_to_keep data.num_shards', (1, 0)),
  *bounds('bn.virtual_batch_size', (1, 0)),
  *bounds('total_steps', (1, -1)),
  *bounds('stuck_after profile_steps profile_first_step', (0, -1)),
  *bounds('data.holdout data.num_threads data.num_workers', (0, -1)),
  *bounds('data.distorted_copies bn.population_batches', (0, -1)),
  *bounds('model.init_std model.aux_loss_weight', (0, -0.1)),
  *bounds('optim.weight_decay', (0, -1e-9)),
  *bounds('divergence_loss model.init_scale bn.epsilon', (1e-9, 0)),
  *bounds('optim.learning_rate optim.decay_epochs', (1e-9, 0)),
  *bounds('data.max_replaced model.dropout_rate', (0, -0.1), (0.9999, 1)),
  *bounds('bn.momentum optim.momentum', (0, -0.1), (0.9999, 1)),
  *bounds('optim.polyak_decay', (0, -0.1), (0.9999, 1)),
  *bounds('optim.decay_rate', (0.1, 0), (1, 1.1)),
  *bounds('model.stem_kernel', (1, -1), (3, 4)),
  *bounds('data.image_size', (32, 31)),
  *bounds('data.fold', (-1, -2), (4, 5)),
  # Of 32 filters, the fewest in the table, exactly a half rounds to none.
  *bounds('model.width', (0.0157, 0.015625)),
]


@pytest.mark.parametrize('name, inside, outside', BOUNDS)
def test_bounds(name, inside, outside):
  load(f'{name}={inside}')
  (problem,) = problems(f'{name}={outside}')
  assert problem.startswith(f'config.{name}={outside}')


def test_every_number_has_bounds():
  numbers = {
    name for name, field in FIELDS.items() if field.type in (int, float)
  }
  assert {name for name, *_ in BOUNDS} == numbers - {'total_epochs'}
  (problem,) = problems('total_steps=0', 'total_epochs=-1')
  assert 'at least 0' in problem


@pytest.mark.parametrize('value', ['nan', 'inf', '-inf'])
def test_numbers_are_finite(value):
  floats = [name for name, field in FIELDS.items() if field.type is float]
  found = problems(*(f'{name}={value}' for name in floats))
  assert [problem.split(':')[0] for problem in found] == [
    f'config.{name}={value}' for name in floats
  ]


CHOICES = {
  'eval_split': 'train validation test',
  'data.shuffle': 'none within_shard global',
  'data.distortion': 'none reduced full',
  'data.evaluation_box': 'square proportional',
  'data.normalization': 'symmetric caffe torchvision',
  'model.name': 'inception inception_tiny mlp',
  'model.reading': '576 608',
  'model.stem': 'separable plain',
  'model.padding': 'same torch',
  'model.nonlinearity': 'relu sigmoid',
  'model.dtype': 'auto float32 bfloat16 float64',
  'bn.statistics': 'global device group',
}


@pytest.mark.parametrize('name', CHOICES)
def test_choices(name):
  choices = CHOICES[name].split()
  for choice in choices:
    load(f'{name}={choice}')
  (problem,) = problems(f'{name}=other')
  assert problem.endswith(f'one of {", ".join(choices)}.')


MLP = ('model.name=mlp',)


@pytest.mark.parametrize(
  'overrides, field, expected',
  [
    (('total_epochs=2',), 'total_steps', 'the other must be 0'),
    (('total_steps=0',), 'total_steps', 'set one of them'),
    *(
      (
        ('bn.statistics=group', f'bn.virtual_batch_size={size}'),
        'bn.virtual_batch_size',
        'must divide config.batch_size=32',
      )
      for size in (24, 64)
    ),
    (
      ('optim.polyak_decay=0.9', 'bn.population_batches=0'),
      'bn.population_batches',
      'averaged parameters need population statistics of their own',
    ),
    *(
      ((*MLP, f'model.{option}'), f'model.{option.split("=")[0]}', 'has none')
      for option in ('aux_head=1', 'lrn=1', 'dropout_rate=0.5')
    ),
    ((*MLP, 'data.distortion=full'), 'data.distortion', 'undistorted images'),
    (
      (*MLP, 'bn.per_activation=1'),
      'bn.per_activation',
      'are those of activations already',
    ),
    (
      ('bn.enabled=0', 'bn.per_activation=1'),
      'bn.per_activation',
      'needs bn.enabled',
    ),
    (
      ('batch_size=1', 'bn.per_activation=1'),
      'batch_size',
      'statistics of activations would be of one value',
    ),
    (
      (
        'bn.statistics=group',
        'bn.virtual_batch_size=1',
        'bn.per_activation=1',
      ),
      'bn.virtual_batch_size',
      'statistics of activations would be of one value',
    ),
    *(
      ((f'data.name={name}', 'data.fold=1'), 'data.fold', 'only mnist_5k has')
      for name in ('mnist', 'imagenet2012', 'synthetic')
    ),
    (('data.image_size=31',), 'data.image_size', 'at least 32 pixels'),
    (
      ('model.name=inception_tiny', 'model.aux_head=1'),
      'model.aux_head',
      'inception_tiny has no module 4d',
    ),
    *(
      (('steps_per_call=5', f'{name}=7'), name, 'config.steps_per_call=5')
      for name in ('total_steps', 'log_every', 'eval_every', 'checkpoint_every')
    ),
  ],
)
def test_fields_in_conflict(overrides, field, expected):
  others = ('log_every=20', 'eval_every=20') * (
    'steps_per_call=10' in overrides
  )
  (problem,) = problems(*others, *overrides)
  assert problem.startswith(f'config.{field}=') and expected in problem


def test_fields_without_conflict():
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
  found = problems(*MLP, 'model.aux_head=1', 'model.lrn=1')
  assert len(found) == 2


def test_missing_files():
  """The message lists the files beside a path, and the shipped names."""
  (problem,) = problems(spec=f'{ROOT}/configs/bn_x6.py')
  shipped = sorted((ROOT / 'configs').glob('[a-z]*.py'))
  assert all(str(path) in problem for path in shipped)
  assert '__init__' not in problem
  (problem,) = problems(spec='no/such/folder.py')
  members = sorted((ROOT / 'configs' / 'ensemble').glob('[a-z]*.py'))
  assert len(members) == 6
  names = ', '.join(
    [
      *(path.stem for path in shipped),
      *(f'ensemble/{path.stem}' for path in members),
    ]
  )
  start = '--config=no/such/folder.py: no such file. Shipped: '
  assert problem == f'{start}{names}.'
  (problem,) = problems(spec='bn_x6:mini')
  assert problem.startswith('--config=bn_x6: neither a file nor a shipped name')
  assert problem.endswith(f' {names}.')


def test_shipped_configs_by_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config_lib.load('bn_x5:mini') == load()
  member = config_lib.load('ensemble/dropout_5:mini')
  assert member.model.dropout_rate == 0.05
  # A folder of that name is no config.
  (tmp_path / 'bn_x5').mkdir()
  assert config_lib.load('bn_x5:mini') == load()
  own_config(tmp_path, 'config.optim.learning_rate *= 2')
  config = config_lib.load('own.py:mini', ['seed=3'])
  assert config.optim.learning_rate == 2 * load().optim.learning_rate
  assert config.seed == 3


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
    ('config.init_from = None', 'init_from=None: must be a string'),
    (
      'del config.seed; config.seed = 1.0',
      'seed=1.0: must be a whole number',
    ),
  ],
)
def test_files_with_other_fields(body, expected, tmp_path):
  (problem,) = problems('init_from=x', spec=own_config(tmp_path, body))
  assert expected in problem


def parse(*arguments):
  parser = cli.Parser(allow_abbrev=False)
  cli.add_config_arguments(parser)
  parser.add_argument('--workdir', required=True)
  return cli.parse_arguments(arguments, parser)


@pytest.mark.parametrize(
  'arguments',
  [
    '--config=c.py --workdir=w --config.seed=-1 --config.a.b=x=y --config.c=',
    '--config c.py --config.seed -1 --workdir w --config.a.b x=y --config.c=',
    '--config.seed -1 --config.a.b=x=y --config.c= --config=c.py --workdir=w',
  ],
)
def test_arguments(arguments):
  flags, overrides = parse(*arguments.split())
  assert flags.config == 'c.py' and flags.workdir == 'w'
  assert overrides == ['seed=-1', 'a.b=x=y', 'c=']


def test_an_empty_argument_is_a_value():
  _, overrides = parse('--config=c', '--workdir=w', '--config.init_from', '')
  assert overrides == ['init_from=']


@pytest.mark.parametrize(
  'arguments, expected',
  [
    ('--config=c', '--workdir'),
    ('--workdir=w', '--config'),
    ('--config=c --workdir=w --sped=1', '--sped=1'),
    ('--config=c --work=w', '--work'),
    ('--config=c --workdir=w more', 'more'),
    ('--config=c --workdir', 'expected one argument'),
  ],
)
def test_refused_arguments(arguments, expected):
  with pytest.raises(UserError) as caught:
    parse(*arguments.split())
  (problem,) = caught.value.problems
  assert expected in problem and problem.endswith('Try --help.')


@pytest.mark.parametrize(
  'arguments, expected',
  [
    (
      '--config=c --workdir=w --config.data.data_dir --config.total_steps=4',
      '--config.data.data_dir needs a value',
    ),
    ('--config=c --config.seed --workdir w', '--config.seed needs a value'),
    ('--config=c --workdir=w --config.seed', '--config.seed needs a value'),
    ('--config=c --config.seed -- --workdir=w', '--config.seed needs a value'),
    ('--config=c --workdir --config.seed=1 w', '--workdir: expected one'),
    ('--config --config.seed 1 c --workdir=w', '--config: expected one'),
  ],
)
def test_a_flag_is_no_value(arguments, expected):
  with pytest.raises(UserError) as caught:
    parse(*arguments.split())
  (problem,) = caught.value.problems
  assert expected in problem


def test_a_value_after_an_equals_sign_may_look_like_a_flag():
  flags, overrides = parse(
    '--config=--c', '--workdir=--w', '--config.data.data_dir=--config.seed=1'
  )
  assert (flags.config, flags.workdir) == ('--c', '--w')
  assert overrides == ['data.data_dir=--config.seed=1']


@pytest.mark.parametrize(
  'arguments', [['--sweep.seed', '--config.seed=1'], ['--sweep.seed']]
)
def test_an_axis_needs_values(arguments):
  parser = cli.Parser(allow_abbrev=False)
  cli.add_config_arguments(parser)
  cli.add_sweep_arguments(parser, required=False)
  with pytest.raises(UserError, match='--sweep.seed needs a value'):
    cli.parse_sweep_arguments(['--config=c', *arguments], parser)
  _, axes, overrides = cli.parse_sweep_arguments(
    ['--config=c', '--sweep.rate', '-1,2', '--config.seed=1'], parser
  )
  assert axes == ['rate=-1,2'] and overrides == ['seed=1']


def test_help_names_its_flags():
  parser = cli.Parser()
  cli.add_config_arguments(parser)
  assert '--config CONFIG[:MODE]' in parser.format_help()
  assert '--config.KEY VALUE' in parser.format_help()


def test_errors_are_a_line_each(capsys):
  assert cli.report_errors(['one', 'two']) == 1
  assert capsys.readouterr().err == 'error: one\nerror: two\n'


@pytest.mark.parametrize(
  'total_steps, total_epochs, steps_per_call, expected',
  [
    (9, 0, 1, 9),
    (0, 2, 1, 250),
    (0, 0.001, 1, 1),
    # A step in progress at the end of the last epoch is completed.
    (0, 1.001, 1, 126),
    # So is a call: 400 of 4,000 images are 12.5 batches of 32.
    (0, 0.1, 5, 15),
  ],
)
def test_total_steps(total_steps, total_epochs, steps_per_call, expected):
  config = load(
    f'total_steps={total_steps}',
    f'total_epochs={total_epochs}',
    f'steps_per_call={steps_per_call}',
  )
  assert config_lib.total_steps(config, 4000) == expected


def fits_layer(num_devices, share, group):
  """Whether the layer itself accepts groups of that size."""
  layer = SimpleNamespace(
    is_initializing=lambda: False,
    virtual_batch_size=group,
    axis_name='data',
    axis_index_groups=None,
    _error=ValueError,
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batch_norm.lax, 'axis_size', lambda name: num_devices)
    try:
      batch_norm.BatchNorm._sharing(layer, (share, 1), (0,))
    except ValueError:
      return False
  return True


@pytest.mark.parametrize('num_devices', range(1, 9))
def test_groups_fit_where_the_layer_accepts_them(num_devices):
  """A refusal names exactly the sizes that fit."""
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
      assert problem.startswith(f'config.bn.virtual_batch_size={size}: ')
      assert f'the {share} images of each of {num_devices} devices' in problem
      # A single image has no variance of its own in the last layers.
      assert problem.endswith(f'Use one of {[n for n in fit if n > 1]}.')


# What a user may change between starts: no earlier step depends on it.
CHANGEABLE = """
total_steps total_epochs log_every eval_every checkpoint_every
checkpoints_to_keep stuck_after tensorboard profile_steps profile_first_step
data.data_dir data.num_threads data.num_workers data.max_replaced
"""
# Fields that have to change with another.
WITH = {
  'total_epochs': ('total_steps=0',),
  'steps_per_call': tuple(
    f'{name}=3'
    for name in ('total_steps', 'log_every', 'eval_every', 'checkpoint_every')
  ),
}


def other_value(name, value):
  """A valid value of a field other than the given one."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, int):
    return value + 2
  if isinstance(value, float):
    return (value or 0.1) * 0.99
  choices = CHOICES[name].split() if name in CHOICES else ['other']
  return next(choice for choice in choices if choice != value)


@pytest.mark.parametrize('name', FIELDS)
def test_what_a_resumed_run_may_change(name):
  config = load()
  value = other_value(name, flatten(config)[name])
  changed = load(f'{name}={value}', *WITH.get(name, ()))
  saved = json.loads(config_lib.to_json(config))
  differences = config_lib.differences(saved, changed)
  same_run = config_lib.digest(config) == config_lib.digest(changed)
  changeable = name in CHANGEABLE.split()
  assert same_run == changeable
  if changeable:
    assert differences == []
  else:
    (difference,) = differences
    old, new = flatten(config)[name], flatten(changed)[name]
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


@pytest.mark.parametrize('name', OLD_RUNS)
def test_runs_of_3a68ec7_resume(name):
  """Those of `mini` can be read, but are none of a fold."""
  old = OLD_RUNS[name]
  spec, _, stand_in = name.partition(', ')
  overrides = ['data.name=imagenet_stand_in'] if stand_in else []
  config = config_lib.load(spec, overrides)
  saved = config_lib.from_json(old['config'], 'w/config.json')
  assert config_lib.digest(saved) == old['digest']
  if config.data.name != 'mnist_5k':
    assert saved == config
    assert config_lib.differences(old['config'], config) == []
    return
  for fold in range(5):
    saved.data.fold = fold
    assert config_lib.digest(saved) != old['digest']
    assert config_lib.differences(old['config'], saved) == [
      f'data.fold: -1 -> {fold}'
    ]


def test_other_data_sets_are_another_run_than_3a68ec7_s():
  old = OLD_RUNS['bn_x5:full']
  config = config_lib.load('bn_x5', ['data.name=imagenet_stand_in'])
  assert config_lib.digest(config) != old['digest']
  assert config_lib.differences(old['config'], config) == [
    'data.name: imagenet2012 -> imagenet_stand_in'
  ]


def test_digest_is_of_values():
  assert re.fullmatch('[0-9a-f]{16}', config_lib.digest(load()))
  assert config_lib.digest(load('seed=0')) == config_lib.digest(load())


def test_json_and_back():
  config = load('optim.weight_decay=0', 'seed=4')
  saved = json.loads(config_lib.to_json(config))
  again = config_lib.from_json(saved, 'w/config.json')
  assert flatten(again) == flatten(config)
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


def test_statistics_of_activations_need_two_images_on_a_device():
  config = load('bn.per_activation=1', 'bn.statistics=device', 'batch_size=8')
  config_lib.check_divides(config, 4)
  with pytest.raises(UserError, match='two images on each device'):
    config_lib.check_divides(config, 8)
