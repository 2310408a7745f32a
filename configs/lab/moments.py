"""How exact is the variance of a batch in float32, by the form it is taken in?"""

from ml_collections import ConfigDict


def get_config(mode: str) -> ConfigDict:
  """Batches of many means and sizes; in `mini` of fewer."""
  full = mode == 'full'
  return ConfigDict(
    {
      'num_seeds': 5 if full else 1,
      'model': {'dtype': 'float32'},
      # Activations of a batch. Errors are those of the worst one.
      'features': 64 if full else 16,
      # The means are 1 to 10^decades standard deviations.
      'decades': 6 if full else 4,
      # The sizes are this one, and its quarter, ...
      'batch_size': 4096 if full else 1024,
    }
  )
