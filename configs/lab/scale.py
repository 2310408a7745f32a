"""Does the size of weights matter if BN follows them?"""

from ml_collections import ConfigDict


def get_config(mode: str) -> ConfigDict:
  """A hidden layer on digits; in `mini` fewer units and steps."""
  full = mode == 'full'
  return ConfigDict(
    {
      'num_seeds': 5 if full else 1,
      'batch_size': 60,
      'steps': 4000 if full else 200,
      # Initial weights are scaled by 1 / max_scale to max_scale.
      'max_scale': 20.0,
      'num_scales': 5,
      # Rates of the weights before BN, each ten times the one before.
      'min_rate': 0.001,
      'num_rates': 3,
      # Of the classifier, to which the size of its weights matters.
      'classifier_rate': 0.1,
      'model': {'dtype': 'float64', 'width': 50 if full else 20},
    }
  )
