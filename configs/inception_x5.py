"""Control (section 4.2.2): Inception at 5 times its learning rate, without BN.

Paper: the parameters reach machine infinity. A run that ends as `diverged`, or
stays at chance, is the result.

  python -m bn_repro.main --config=configs/inception_x5.py --workdir=runs/inception_x5
"""

from ml_collections import ConfigDict

from configs import inception


def get_config(mode: str = 'full') -> ConfigDict:
  """Inception at x5."""
  config = inception.get_config(mode)
  config.optim.learning_rate *= 5
  return config
