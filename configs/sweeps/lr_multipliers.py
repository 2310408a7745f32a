"""Section 4.2, the headline: up to which learning rate does each net train?

Multiples of Inception's rate, with BN and without. The paper trains BN nets at
x5 and x30, and reports that Inception at x5 does not train.

  python -m bn_repro.sweep --sweep=configs/sweeps/lr_multipliers.py --workdir=runs/lr

28 runs. In `mini`, the default of sweeps, they take some twenty minutes on two
cores; `:full` after the file is the paper's scale. This file explains all parts
of a sweep; the other sweeps explain only what differs.
"""

from ml_collections import ConfigDict

from bn_repro.sweep.sweep import Base, Sweep


def trial(base: Base, variant: str, multiplier: float, seed: int) -> ConfigDict:
  """Returns the config of one trial, given a value of each axis.

  `base(NAME)` returns `configs/NAME.py` in the mode of the sweep, with the
  command line's `--config.KEY=VALUE` applied.
  """
  config = base(variant)
  config.optim.learning_rate *= multiplier
  config.seed = seed
  return config


def get_sweep(mode: str = 'mini') -> Sweep:
  """The sweep; `mode` is that of the configs."""
  del mode  # The same in both.
  return Sweep(
    # One trial for each combination of values. The other values of an axis are
    # compared with the first.
    axes={
      'variant': ('inception', 'bn_baseline'),
      'multiplier': (1, 2, 5, 10, 15, 30, 60),
      'seed': (0, 1),
    },
    trial=trial,
    # The axis on the x-axis of the figure, and the one that repeats a setting.
    # The other axes, combined, are the lines of the figure.
    x='multiplier',
    repeat='seed',
    # Fields of every config that `base` returns, by dotted name.
    defaults={},
  )
