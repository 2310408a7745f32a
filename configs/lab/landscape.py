"""Does BN make the loss smoother, and reduce internal covariate shift?"""

from ml_collections import ConfigDict


def get_config(mode: str) -> ConfigDict:
  """A deep network of ReLUs on Fashion-MNIST; in `mini` a few steps on digits.

  All values are our choice, but for the batch of the paper's ImageNet...
  """
  full = mode == 'full'
  return ConfigDict(
    {
      'num_seeds': 5 if full else 1,
      'batch_size': 128,
      'total_steps': 450 if full else 60,
      'measure_every': 30 if full else 20,
      'learning_rate': {'low': 0.01, 'high': 0.1},
      'data': {
        'name': 'fashion_mnist' if full else 'mnist_5k',
        'data_dir': '',
        'fold': 0,
      },
      'model': {
        'dtype': 'float32',
        'depth': 8,
        'width': 100,
      },
    }
  )
