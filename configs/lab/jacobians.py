"""Is a layer with BN close to an isometry?"""

from ml_collections import ConfigDict


def get_config(mode: str) -> ConfigDict:
  """Networks of some layers on digits; in `mini` smaller and trained less."""
  full = mode == 'full'
  return ConfigDict(
    {
      'num_seeds': 5 if full else 1,
      'batch_size': 128 if full else 32,
      'steps': 1000 if full else 50,
      'learning_rate': 0.1,  # Our choice: all networks can take it.
      'model': {
        'dtype': 'float32',
        'depth': 8 if full else 4,
        'width': 64 if full else 24,
      },
    }
  )
