"""Which statistics, and which batch?"""

from ml_collections import ConfigDict


def get_config(mode: str) -> ConfigDict:
  """A convolutional network on Fashion-MNIST; in `mini` on 4,000 digits.

  All values are our choice, but for the sizes of groups and 128 images a batch,
  which cover those of the publications.
  """
  full = mode == 'full'
  return ConfigDict(
    {
      'num_seeds': 5 if full else 1,
      'epochs': 1.0 if full else 2.0,
      # Images per update, and the larger batch that moving averages follow.
      'batch_size': 128,
      'large_batch_size': 1024 if full else 512,
      # Images that share statistics in training.
      'groups': '2,4,8,16,32,128' if full else '4,32',
      # Images of population statistics, each a power of 2, so that groups are
      # full. The last number is to be as good as all images.
      'images': '16,128,1024,8192' if full else '16,128,1024',
      # Times of a training, equally spaced; noise is measured at the later half.
      'marks': 8,
      # At `batch_size`; larger batches have proportionally more.
      'learning_rate': 0.05,
      # Share of the old value in moving averages. Wu and Johnson's.
      'bn_momentum': 0.9,
      # Fields of `data.datasets`.
      'data': {
        'name': 'fashion_mnist' if full else 'mnist_5k',
        'data_dir': '',
        'image_size': 28,
        'fold': 0,
        'holdout': 0,
        'distorted_copies': 0,
        'binarize': False,
      },
      'model': {'dtype': 'float32'},
    }
  )
