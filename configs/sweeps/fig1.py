"""Fig. 1: the MNIST network, with BN and without.

python -m bn_repro.sweep --sweep=fig1 --workdir=runs/fig1
"""

from ml_collections import ConfigDict

from bn_repro.sweep.sweep import Base, Sweep


def trial(base: Base, variant: str, seed: int) -> ConfigDict:
  """A network with a seed."""
  config = base(variant)
  config.seed = seed
  return config


def get_sweep(mode: str = 'mini') -> Sweep:
  """Both networks with five seeds."""
  del mode  # The same in both.
  return Sweep(
    axes={'variant': ('mnist', 'bn_mnist'), 'seed': (0, 1, 2, 3, 4)},
    trial=trial,
    x='variant',
    repeat='seed',
  )
