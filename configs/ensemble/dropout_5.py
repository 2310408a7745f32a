"""A member of the ensemble (section 4.2.3): BN-x30 with dropout of 5 %.

python -m bn_repro.main --config=ensemble/dropout_5 --workdir=runs/dropout_5
"""

from ml_collections import ConfigDict

from configs import bn_x30


def get_config(mode: str = 'full') -> ConfigDict:
  """BN-x30 with a little dropout."""
  config = bn_x30.get_config(mode)
  config.seed = 1  # Our choice: no two members start from the same weights.
  config.model.dropout_rate = 0.05
  return config
