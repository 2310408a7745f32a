"""Fig. 2 and 3 on 5,000 digits of MNIST, by cross-validation.

Seed K tests on fold K of five, so that each digit is a test image once.

  python -m bn_repro.sweep --sweep=mnist_5k --workdir=runs/mnist_5k
"""

from ml_collections import ConfigDict

from bn_repro import paper
from bn_repro.sweep.sweep import Base, Sweep
from configs.sweeps import setting


def trial(base: Base, variant: str, seed: int) -> ConfigDict:
  """A network at the chosen setting, which is that of `mini`."""
  config = setting.trial(base, variant, 'mnist_5k', 1.0, setting.RATE, seed)
  config.data.fold = seed
  return config


def get_sweep(mode: str = 'mini') -> Sweep:
  """The networks, each on five folds."""
  del mode
  return Sweep(
    axes={'variant': paper.FIG_3, 'seed': (0, 1, 2, 3, 4)},
    trial=trial,
    x='variant',
    repeat='seed',
  )
