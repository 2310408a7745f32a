"""Section 4.2.3: BN-x30 and the six members of the ensemble.

`python -m bn_repro.ensemble` then averages the probabilities of the members.

  python -m bn_repro.sweep --sweep=ensemble --workdir=runs/ensemble
"""

from ml_collections import ConfigDict

from bn_repro import paper
from bn_repro.sweep.sweep import Base, Sweep

_NETS = ('bn_x30', *paper.ENSEMBLE)


def trial(base: Base, net: str, seed: int) -> ConfigDict:
  """A net with its own seed, or with another that no other net has."""
  config = base(net if net == 'bn_x30' else f'ensemble/{net}')
  config.seed += len(_NETS) * seed
  return config


def get_sweep(mode: str = 'mini') -> Sweep:
  """Each net once; the first is the single network of Fig. 4."""
  del mode  # The same in both.
  return Sweep(
    axes={'net': _NETS, 'seed': (0,)},
    trial=trial,
    x='net',
    repeat='seed',
  )
