"""Control (section 4.2.2): Inception at 5 times its learning rate, without BN.

Paper: the parameters reach machine infinity. A run that diverges, or stays at
chance, confirms this.

  python -m bn_repro.main --config=inception_x5 --workdir=runs/inception_x5
"""

from ml_collections import ConfigDict

from configs import inception


def get_config(mode: str = 'full') -> ConfigDict:
  """Inception with 5 times the learning rate."""
  config = inception.get_config(mode)
  config.optim.learning_rate *= 5
  if mode == 'mini':
    config.total_steps = 500  # As many as BN-x5.
  return config
