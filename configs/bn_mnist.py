"""The MNIST network (section 4.1) with BN on its three hidden layers.

Paper: Fig. 1. Trains faster than without and ends higher, and what its sigmoids
receive is stable.

  python -m bn_repro.main --config=configs/bn_mnist.py --workdir=runs/bn_mnist
"""

from ml_collections import ConfigDict

from configs import mnist


def get_config(mode: str = 'full') -> ConfigDict:
  """The network of Fig. 1 with batch normalisation and nothing else."""
  config = mnist.get_config(mode)
  config.bn.enabled = True
  return config
