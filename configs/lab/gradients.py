"""How do gradients grow from layer to layer at initialization?"""

from ml_collections import ConfigDict


def get_config(mode: str) -> ConfigDict:
  """A deep network of ReLUs; in `mini` less wide and deep."""
  full = mode == 'full'
  return ConfigDict(
    {
      'num_seeds': 5 if full else 1,
      'batch_size': 1024 if full else 512,
      'model': {
        'dtype': 'float32',
        'depth': 40 if full else 20,
        'width': 1024 if full else 512,
      },
    }
  )
