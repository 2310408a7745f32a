"""Batches of 32 to 512, the learning rate scaled linearly with them.

All runs see the same number of images and decay the rate after the same number.
`optim.learning_rate` is the rate for batches of 32: a batch of 64 trains with
twice that rate, as in CNTK.

  python -m bn_repro.sweep --sweep=configs/sweeps/batch_size.py --workdir=runs/batch_size
"""

from ml_collections import ConfigDict

from bn_repro.sweep.sweep import Base, Sweep


def trial(base: Base, variant: str, larger: int, seed: int) -> ConfigDict:
  """A net with a batch `larger` times as large, and as many times fewer steps."""
  config = base(variant)
  config.batch_size *= larger
  for field in ('total_steps', 'log_every', 'eval_every', 'checkpoint_every'):
    if config[field] % larger:
      raise ValueError(f'{field}={config[field]} is not a multiple of {larger}')
    config[field] //= larger
  config.seed = seed
  return config


def get_sweep(mode: str = 'mini') -> Sweep:
  """Multiples of the batch size."""
  return Sweep(
    axes={
      'variant': ('inception', 'bn_baseline', 'bn_x5'),
      'larger': (1, 2, 4, 8, 16),
      'seed': (0, 1),
    },
    trial=trial,
    x='larger',
    repeat='seed',
    # Multiples of 16.
    defaults={
      'total_steps': 512,
      'log_every': 32,
      'eval_every': 32,
      'checkpoint_every': 128,
    }
    if mode == 'mini'
    else {'log_every': 1600},
  )
