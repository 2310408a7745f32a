"""Control (section 4.2.2): Inception with the sigmoid, without BN.

Paper: accuracy never above chance, 1/1000.

  python -m bn_repro.main --config=configs/inception_sigmoid.py --workdir=runs/inception_sigmoid
"""

from ml_collections import ConfigDict

from configs import inception


def get_config(mode: str = 'full') -> ConfigDict:
  """Inception with the logistic nonlinearity."""
  config = inception.get_config(mode)
  config.model.nonlinearity = 'sigmoid'
  return config
