"""BN-x5-Sigmoid (section 4.2.2): BN-x5 with the sigmoid in place of ReLU.

Paper: best 69.8 %; the same network without BN stays at chance.

  python -m bn_repro.main --config=bn_x5_sigmoid --workdir=runs/bn_x5_sigmoid
"""

from ml_collections import ConfigDict

from configs import bn_x5


def get_config(mode: str = 'full') -> ConfigDict:
  """BN-x5 with the logistic sigmoid as the nonlinearity."""
  config = bn_x5.get_config(mode)
  config.model.nonlinearity = 'sigmoid'
  return config
