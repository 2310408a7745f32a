"""A member of the ensemble (section 4.2.3): BN-x30 with two of the changes.

The paper does not say which member has which changes; this pair is our choice.

  python -m bn_repro.main --config=ensemble/init_2_dropout_5 --workdir=runs/init_2_dropout_5
"""

from ml_collections import ConfigDict

from configs import bn_x30


def get_config(mode: str = 'full') -> ConfigDict:
  """BN-x30 with twice the initial weights and dropout of 5 %."""
  config = bn_x30.get_config(mode)
  config.seed = 5  # Our choice: no two members start from the same weights.
  # The factor is our choice. It applies to the classifier as well.
  config.model.init_scale = 2.0
  config.model.dropout_rate = 0.05
  return config
