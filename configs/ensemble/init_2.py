"""A member of the ensemble (section 4.2.3): BN-x30 with larger initial weights.

python -m bn_repro.main --config=ensemble/init_2 --workdir=runs/init_2
"""

from ml_collections import ConfigDict

from configs import bn_x30


def get_config(mode: str = 'full') -> ConfigDict:
  """BN-x30 with twice the initial weights."""
  config = bn_x30.get_config(mode)
  config.seed = 3  # Our choice: no two members start from the same weights.
  # The factor is our choice. It applies to the classifier as well.
  config.model.init_scale = 2.0
  return config
