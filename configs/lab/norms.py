"""Which normalization permits the paper's learning rates, at which batch size?"""

from ml_collections import ConfigDict


def get_config(mode: str) -> ConfigDict:
  """A network of convolutions; in `mini` with fewer steps."""
  full = mode == 'full'
  return ConfigDict(
    {
      'num_seeds': 5 if full else 1,
      'steps': 200 if full else 20,
      # Images of a step: the paper's, and few.
      'batch_size': 32,
      'small_batch_size': 2,
      # As in `inception:mini`.
      'learning_rate': 0.02,
      'momentum': 0.9,
      # The fifth of mnist_5k that is its test split.
      'data': {'fold': 0},
      'model': {
        'dtype': 'float32',
        'depth': 4,
        'width': 16 if full else 8,
        'groups': 4,
      },
    }
  )
