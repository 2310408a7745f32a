"""BN-x5-Sigmoid (section 4.2.2): BN-x5 with the sigmoid in place of ReLU.

Paper: best 69.8 %; without BN the same net never leaves chance.

  python -m bn_repro.main --config=configs/bn_x5_sigmoid.py --workdir=runs/bn_x5_sigmoid
"""

from ml_collections import ConfigDict

from configs import bn_x5


def get_config(mode: str = 'full') -> ConfigDict:
  """BN-x5 with the logistic nonlinearity."""
  config = bn_x5.get_config(mode)
  config.model.nonlinearity = 'sigmoid'
  return config
