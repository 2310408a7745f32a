"""A member of the ensemble (section 4.2.3): BN-x30 with two of the changes.

The paper does not say which member has which changes; this pair is our choice.

  python -m bn_repro.main --config=ensemble/per_activation_dropout_10 --workdir=runs/per_activation_dropout_10
"""

from ml_collections import ConfigDict

from configs import bn_x30


def get_config(mode: str = 'full') -> ConfigDict:
  """BN-x30 with per-activation BN in 5b and dropout of 10 %."""
  config = bn_x30.get_config(mode)
  config.seed = 6  # Our choice: no two members start from the same weights.
  config.bn.per_activation = True
  config.model.dropout_rate = 0.1
  return config
