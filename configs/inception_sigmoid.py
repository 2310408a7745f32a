"""Control (section 4.2.2): Inception with the sigmoid, without BN.

Paper: the accuracy stays at chance, 1/1000.

  python -m bn_repro.main --config=inception_sigmoid --workdir=runs/inception_sigmoid
"""

from ml_collections import ConfigDict

from configs import inception


def get_config(mode: str = 'full') -> ConfigDict:
  """Inception with the logistic sigmoid as the nonlinearity."""
  config = inception.get_config(mode)
  config.model.nonlinearity = 'sigmoid'
  if mode == 'mini':
    config.total_steps = 500  # As many as BN-x5.
  return config
