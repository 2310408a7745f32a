"""The paper's headline (section 4.2): at how high a rate does each net train?

Multiples of the rate of Inception, with BN and without. The paper trains BN nets
at x5 and x30, and has Inception break at x5.

  python -m bn_repro.sweep --sweep=configs/sweeps/lr_multipliers.py --workdir=runs/lr

28 runs at CPU scale (`mini`, the default of sweeps), some twenty minutes on two
cores; `:full` after the file is the paper's experiment. This file has every field
of a sweep; the other sweeps explain what differs.
"""

from ml_collections import ConfigDict


def get_config(mode: str = 'mini') -> ConfigDict:
  """Every field, for configs in a mode."""
  sweep = ConfigDict()

  # What each trial starts from, a file of this repository, and assignments for
  # all of them.
  sweep.config = f'configs/inception.py:{mode}'
  sweep.overrides = ()

  # What varies: a trial for each combination of values. `set` says what a value,
  # in the place of {}, sets: key=value, or *= and /= to multiply and divide what
  # is there; `config` is the name of a file beside the base, in its mode. The
  # first value of each axis is what the others are held against.
  sweep.axes = ConfigDict()

  sweep.axes.variant = ConfigDict()
  sweep.axes.variant.values = ('inception', 'bn_baseline')
  sweep.axes.variant.set = ('config={}',)

  sweep.axes.multiplier = ConfigDict()
  sweep.axes.multiplier.values = (1, 2, 5, 10, 15, 30, 60)
  sweep.axes.multiplier.set = ('optim.learning_rate*={}',)

  sweep.axes.seed = ConfigDict()
  sweep.axes.seed.values = (0, 1)
  sweep.axes.seed.set = ('seed={}',)

  # The axis below the picture, and the one whose values repeat a setting; the
  # others, together, are the lines of the picture.
  sweep.x = 'multiplier'
  sweep.repeat = 'seed'

  # How often a trial that failed and got no further is started again.
  sweep.retries = 1
  return sweep
