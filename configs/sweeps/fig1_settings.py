"""Fig. 1 at other initial weights and learning rates.

Question: how much does Fig. 1 depend on these two choices, which the paper does
not give?

  python -m bn_repro.sweep --sweep=fig1_settings --workdir=runs/fig1_settings
"""

from ml_collections import ConfigDict

from bn_repro import paper
from bn_repro.sweep.sweep import Base, Sweep


def trial(
  base: Base, variant: str, std: float, rate: float, seed: int
) -> ConfigDict:
  """A network of Fig. 1; `rate` applies to batches of its own size."""
  config = base(variant)
  config.model.init_std = std
  config.optim.learning_rate = rate * paper.BATCH_SIZE / config.batch_size
  config.eval_every = 2500
  config.seed = seed
  return config


def get_sweep(mode: str = 'mini') -> Sweep:
  """Three standard deviations and three learning rates, one seed."""
  del mode  # The same in both.
  return Sweep(
    axes={
      'variant': ('mnist', 'bn_mnist'),
      'std': (0.01, 0.05, 0.1),
      'rate': (0.1, 0.5, 1.0),
      'seed': (0,),
    },
    trial=trial,
    x='rate',
    repeat='seed',
  )
