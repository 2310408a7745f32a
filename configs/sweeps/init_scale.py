"""Section 3.3: how much do nets depend on the scale of their initial weights?

With BN, the Jacobian of a layer does not depend on the scale of its weights.
Multiples of the configs' initial weights (He's), with BN and without.

  python -m bn_repro.sweep --sweep=configs/sweeps/init_scale.py --workdir=runs/init_scale
"""

from ml_collections import ConfigDict

from bn_repro.sweep.sweep import Base, Sweep


def trial(base: Base, variant: str, scale: float, seed: int) -> ConfigDict:
  """A net with all its initial weights scaled."""
  config = base(variant)
  config.model.init_scale *= scale
  config.seed = seed
  return config


def get_sweep(mode: str = 'mini') -> Sweep:
  """A twentieth to twenty times the initial weights."""
  del mode  # The same in both.
  return Sweep(
    axes={
      'variant': ('inception', 'bn_baseline'),
      'scale': (1.0, 0.05, 0.2, 0.5, 2.0, 5.0, 20.0),
      'seed': (0, 1),
    },
    trial=trial,
    x='scale',
    repeat='seed',
  )
