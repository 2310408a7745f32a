"""Fig. 2 and 3 on Fashion-MNIST: all networks of section 4.2, five seeds.

python -m bn_repro.sweep --sweep=fashion_mnist --workdir=runs/fashion_mnist
"""

from ml_collections import ConfigDict

from bn_repro import paper
from bn_repro.sweep.sweep import Base, Sweep
from configs.sweeps import setting


def trial(base: Base, variant: str, seed: int) -> ConfigDict:
  """A network at the chosen setting."""
  return setting.trial(base, variant, 'fashion_mnist', 1.0, setting.RATE, seed)


def get_sweep(mode: str = 'mini') -> Sweep:
  """The networks, each with five seeds."""
  del mode
  return Sweep(
    axes={'variant': paper.FIG_3, 'seed': (0, 1, 2, 3, 4)},
    trial=trial,
    x='variant',
    repeat='seed',
  )
