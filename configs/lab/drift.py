"""Must the gradient step know of the normalization?"""

from ml_collections import ConfigDict


def get_config(mode: str) -> ConfigDict:
  """A bias, and a network with two hidden layers of 16 sigmoids; in `mini` fewer steps."""
  full = mode == 'full'
  return ConfigDict(
    {
      'num_seeds': 5 if full else 1,
      'steps': 500 if full else 100,
      # Images of a step: those of section 4.1.
      'batch_size': 60,
      # The middle one of five.
      'learning_rate': 1.0,
      'momentum': 0.0,
      # The fifth of mnist_5k that is its test split.
      'data': {'fold': 0},
      'model': {'dtype': 'float32', 'depth': 2, 'width': 16},
    }
  )
