"""A member of the ensemble (section 4.2.3): BN-x30 with per-activation BN.

python -m bn_repro.main --config=ensemble/per_activation --workdir=runs/per_activation
"""

from ml_collections import ConfigDict

from configs import bn_x30


def get_config(mode: str = 'full') -> ConfigDict:
  """BN-x30 with a mean and variance for each activation of 5b."""
  config = bn_x30.get_config(mode)
  config.seed = 4  # Our choice: no two members start from the same weights.
  config.bn.per_activation = True
  return config
