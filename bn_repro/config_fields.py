"""The fields of a config: types, ranges, and checks across fields.

`configs/inception.py` gives each field its value and explains it.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

from ml_collections import ConfigDict

from bn_repro import files
from bn_repro.models import inception_table

# `data.fold` of runs on mnist_5k from before there were folds. They had 500
# test digits. Their networks can be used, but their split is no longer made.
BEFORE_FOLDS = -1

# Takes a value; returns the requirement that it violates, or None.
Rule = Callable[[Any], str | None]


def _any(value: Any) -> str | None:
  del value
  return None


def _one_of(*choices: str) -> Rule:
  return lambda value: (
    None if value in choices else f'must be one of {", ".join(choices)}'
  )


def _at_least(bound: float) -> Rule:
  return lambda value: None if value >= bound else f'must be at least {bound}'


def _above(bound: float) -> Rule:
  return lambda value: (
    None if value > bound else f'must be greater than {bound}'
  )


def _fraction(value: float) -> str | None:
  return None if 0 <= value < 1 else 'must be at least 0 and below 1'


def _seed(value: int) -> str | None:
  return None if 0 <= value < 2**32 else 'must be at least 0 and below 2^32'


def _path(value: str) -> str | None:
  return files.path_problem(value) if value else None


def _workdir(value: str) -> str | None:
  # Places in buckets are checked where they are read.
  return None if value.startswith(files.BUCKET) else _path(value)


def _fold(value: int) -> str | None:
  return None if BEFORE_FOLDS <= value < 5 else 'must be 0 to 4'


def _odd(value: int) -> str | None:
  return None if value >= 1 and value % 2 else 'must be an odd number'


def _decay_rate(value: float) -> str | None:
  return None if 0 < value <= 1 else 'must be greater than 0 and at most 1'


def _width(value: float) -> str | None:
  bound = inception_table.width_bound()
  if value > bound:
    return None
  return (
    'leaves a branch of the network without channels; '
    f'must be greater than {bound:g}'
  )


@dataclasses.dataclass(frozen=True)
class Field:
  """What a field accepts, and when its value may change.

  Attributes:
    type: type of the value; other types are refused.
    rule: requirement on the value.
    changeable: whether a resumed run may change it, because no earlier step
      depends on it.
    per_host: whether the processes of a run may have different values.
  """

  type: type
  rule: Rule = _any
  _: dataclasses.KW_ONLY
  changeable: bool = False
  per_host: bool = False


# The fields by dotted name, in the order of `configs/inception.py`.
FIELDS: Mapping[str, Field] = {
  'seed': Field(int, _seed),
  'batch_size': Field(int, _at_least(1)),
  'total_steps': Field(int, _at_least(0), changeable=True),
  'total_epochs': Field(float, _at_least(0), changeable=True),
  'steps_per_call': Field(int, _at_least(1)),
  'log_every': Field(int, _at_least(1), changeable=True),
  'eval_every': Field(int, _at_least(1), changeable=True),
  'checkpoint_every': Field(int, _at_least(1), changeable=True),
  'checkpoints_to_keep': Field(int, _at_least(1), changeable=True),
  'eval_split': Field(str, _one_of('train', 'validation', 'test')),
  'stuck_after': Field(float, _at_least(0), changeable=True),
  'tensorboard': Field(bool, changeable=True),
  'profile_steps': Field(int, _at_least(0), changeable=True),
  'profile_first_step': Field(int, _at_least(0), changeable=True),
  'divergence_loss': Field(float, _above(0)),
  'init_from': Field(str, _workdir),
  # One of `data.datasets.SOURCES`, which is checked where data are loaded: a
  # trained network can be used where its data set is unknown.
  'data.name': Field(str),
  'data.data_dir': Field(str, _path, changeable=True, per_host=True),
  'data.image_size': Field(int, _at_least(1)),
  'data.fold': Field(int, _fold),
  'data.holdout': Field(int, _at_least(0)),
  'data.shuffle': Field(str, _one_of('none', 'within_shard', 'global')),
  'data.num_shards': Field(int, _at_least(1)),
  'data.distorted_copies': Field(int, _at_least(0)),
  'data.binarize': Field(bool),
  'data.distortion': Field(str, _one_of('none', 'reduced', 'full')),
  'data.evaluation_box': Field(str, _one_of('square', 'proportional')),
  'data.normalization': Field(
    str, _one_of('symmetric', 'caffe', 'torchvision')
  ),
  'data.num_threads': Field(int, _at_least(0), changeable=True, per_host=True),
  'data.num_workers': Field(int, _at_least(0), changeable=True, per_host=True),
  'data.max_replaced': Field(float, _fraction, changeable=True),
  'model.name': Field(str, _one_of('inception', 'inception_tiny', 'mlp')),
  'model.init_std': Field(float, _at_least(0)),
  'model.init_scale': Field(float, _above(0)),
  'model.reading': Field(str, _one_of('576', '608')),
  'model.stem': Field(str, _one_of('separable', 'plain')),
  'model.stem_kernel': Field(int, _odd),
  'model.stem_pool': Field(bool),
  'model.padding': Field(str, _one_of('same', 'torch')),
  'model.width': Field(float, _width),
  'model.nonlinearity': Field(str, _one_of('relu', 'sigmoid')),
  'model.lrn': Field(bool),
  'model.dropout_rate': Field(float, _fraction),
  'model.aux_head': Field(bool),
  'model.aux_loss_weight': Field(float, _at_least(0)),
  'model.dtype': Field(str, _one_of('auto', 'float32', 'bfloat16', 'float64')),
  'bn.enabled': Field(bool),
  'bn.per_activation': Field(bool),
  'bn.statistics': Field(str, _one_of('global', 'device', 'group')),
  'bn.virtual_batch_size': Field(int, _at_least(1)),
  'bn.momentum': Field(float, _fraction),
  'bn.epsilon': Field(float, _above(0)),
  'bn.population_batches': Field(int, _at_least(0)),
  'optim.learning_rate': Field(float, _above(0)),
  'optim.momentum': Field(float, _fraction),
  'optim.weight_decay': Field(float, _at_least(0)),
  'optim.decay_rate': Field(float, _decay_rate),
  'optim.decay_epochs': Field(float, _above(0)),
  'optim.polyak_decay': Field(float, _fraction),
}

CHANGEABLE = frozenset(
  name for name, field in FIELDS.items() if field.changeable
)

# How messages name the types.
TYPE_NAMES = {
  bool: 'true or false',
  int: 'a whole number',
  float: 'a number',
  str: 'a string',
}


def flatten(config: ConfigDict) -> dict[str, Any]:
  """Returns the fields of a config by dotted name."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      flat |= {f'{key}.{name}': leaf for name, leaf in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def schema_errors(config: ConfigDict) -> list[str]:
  """Returns a line for each field that is missing, unknown or mistyped."""
  fields = flatten(config)
  missing = [
    f'{name}: the field is missing.' for name in FIELDS if name not in fields
  ]
  unknown = [f'{name}: no such field.' for name in fields if name not in FIELDS]
  return sorted(missing + unknown) or [
    f'{name}={fields[name]}: must be {TYPE_NAMES[field.type]}.'
    for name, field in FIELDS.items()
    if type(fields[name]) is not field.type
  ]


def value_errors(config: ConfigDict) -> list[str]:
  """Returns a line for each value out of range or in conflict with another.

  Each line begins with the name of a field. Conflicts are looked for only
  where every value is in range.

  Args:
    config: a config without `schema_errors`.
  """
  return _range_errors(config) or [
    *_duration_errors(config),
    *_data_errors(config),
    *_network_errors(config),
    *_bn_errors(config),
  ]


def _range_errors(config: ConfigDict) -> list[str]:
  errors = []
  values = flatten(config)
  for name, field in FIELDS.items():
    value = values[name]
    violated = (
      'must be a finite number'
      if field.type is float and not math.isfinite(value)
      else field.rule(value)
    )
    if violated:
      errors.append(f'{name}={value}: {violated}.')
  return errors


def _duration_errors(config: ConfigDict) -> list[str]:
  """Checks that one duration is set, and that calls divide the intervals."""
  errors = []
  if bool(config.total_steps) == bool(config.total_epochs):
    errors.append(
      f'total_steps={config.total_steps} and config.total_epochs='
      f'{config.total_epochs}: set one of them; the other must be 0.'
    )
  return errors + [
    f'{name}={config[name]}: must be a multiple of config.steps_per_call='
    f'{config.steps_per_call}.'
    for name in ('total_steps', 'log_every', 'eval_every', 'checkpoint_every')
    if config[name] % config.steps_per_call
  ]


def _data_errors(config: ConfigDict) -> list[str]:
  """Checks that only the data set of several folds has one selected."""
  if config.data.fold and config.data.name != 'mnist_5k':
    return [
      f'data.fold={config.data.fold}: only mnist_5k has folds; with '
      f'config.data.name={config.data.name} it must be 0.'
    ]
  return []


def _network_errors(config: ConfigDict) -> list[str]:
  """Checks image sizes, and options that one of the networks does not have."""
  if config.model.name == 'mlp':
    return _mlp_errors(config)
  return _inception_errors(config)


def _mlp_errors(config: ConfigDict) -> list[str]:
  errors = [
    f'model.{name}={config.model[name]}: the network mlp has none; turn it off.'
    for name in ('lrn', 'aux_head', 'dropout_rate')
    if config.model[name]
  ]
  if config.bn.per_activation:
    errors.append(
      'bn.per_activation=True: the statistics of the network mlp are those of '
      'activations already; turn it off.'
    )
  if config.data.normalization != 'symmetric':
    errors.append(
      f'data.normalization={config.data.normalization}: the network mlp takes '
      'pixels in [-1, 1]; set it to symmetric.'
    )
  if config.data.distortion != 'none':
    errors.append(
      f'data.distortion={config.data.distortion}: the network mlp is trained '
      'on undistorted images; set it to none.'
    )
  return errors


def _inception_errors(config: ConfigDict) -> list[str]:
  errors = []
  if config.data.image_size < inception_table.MIN_IMAGE_SIZE:
    errors.append(
      f'data.image_size={config.data.image_size}: too small for the network, '
      f'which takes images of at least {inception_table.MIN_IMAGE_SIZE} pixels.'
    )
  head = inception_table.AUX_HEAD_AFTER
  tiny = config.model.name == 'inception_tiny'
  rows = inception_table.rows(config.model.reading, tiny=tiny)
  if config.model.aux_head and head not in [row.name for row in rows]:
    errors.append(
      f'model.aux_head=True: {config.model.name} has no module {head}, which '
      'it would follow; turn it off.'
    )
  return errors


def _bn_errors(config: ConfigDict) -> list[str]:
  """Checks BN groups, and options that need BN or population statistics."""
  errors = []
  if config.bn.statistics == 'group' and (
    config.batch_size % config.bn.virtual_batch_size
  ):
    errors.append(
      f'bn.virtual_batch_size={config.bn.virtual_batch_size}: must divide '
      f'config.batch_size={config.batch_size}.'
    )
  if config.bn.per_activation and not config.bn.enabled:
    errors.append('bn.per_activation=True: needs bn.enabled.')
  grouped = config.bn.statistics == 'group'
  examples = 'bn.virtual_batch_size' if grouped else 'batch_size'
  if config.bn.per_activation and flatten(config)[examples] == 1:
    errors.append(
      f'{examples}=1: statistics of activations would be of one value; set it '
      'to 2 or more, or turn bn.per_activation off.'
    )
  averaged = config.bn.enabled and config.optim.polyak_decay
  if averaged and not config.bn.population_batches:
    errors.append(
      'bn.population_batches=0: averaged parameters need population '
      'statistics of their own; set it, or set config.optim.polyak_decay=0.'
    )
  return errors
