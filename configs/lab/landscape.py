"""Does BN make the loss smoother, and reduce internal covariate shift?"""

from ml_collections import ConfigDict


def get_config(mode: str) -> ConfigDict:
  """Two epochs of Fashion-MNIST; in `mini` some steps on digits.

  All values are our choice. The network is deep enough for BN to matter, and
  without BN it still trains at the high rate.
  """
  full = mode == 'full'
  return ConfigDict(
    {
      'num_seeds': 5 if full else 1,
      'batch_size': 128,
      'total_steps': 900 if full else 60,
      'measure_every': 75 if full else 20,
      'learning_rate': {'low': 0.01, 'high': 0.1},
      'data': {
        'name': 'fashion_mnist' if full else 'mnist_5k',
        'data_dir': '',  # As in configs/inception.py.
        'fold': 0,  # The part of mnist_5k that is not trained on.
      },
      'model': {'dtype': 'float32', 'depth': 8, 'width': 100},
    }
  )
