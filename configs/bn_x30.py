"""BN-x30 (section 4.2.2): BN-x5 with 30 times the learning rate of Inception.

Paper: 72.2 % after 2.7 million steps, slower at first than BN-x5; best 74.8 %,
after 6 million.

  python -m bn_repro.main --config=bn_x30 --workdir=runs/bn_x30
"""

from ml_collections import ConfigDict

from configs import bn_x5


def get_config(mode: str = 'full') -> ConfigDict:
  """BN-x5 with the learning rate of x30."""
  config = bn_x5.get_config(mode)
  config.optim.learning_rate *= 6  # From x5 to x30.
  return config
