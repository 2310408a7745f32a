"""Writes the golden files of `layouts_test.py`, by the projects themselves.

  pip install --no-deps pytorchcv==0.0.74 pretrainedmodels==0.7.4
  python tests/make_weights_golden.py pytorchcv
  python tests/make_weights_golden.py cadene

and, in the environment of `scripts/prepare_imagenet.sh`,

  pip install --no-deps tf_slim==1.1.0 tf_keras==2.21.0
  python tests/make_weights_golden.py slim

A file holds the name and shape of each variable of the project's network, and
what the network computes in float64 with the weights of `weights_case.py`.
"""

import importlib.util
import json
import os
from pathlib import Path
import sys

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch_case
import weights_case


def run_torch(network):
  """Shapes by name, and the outputs of a module of PyTorch."""
  import torch

  shapes = {
    name: list(x.shape)
    for name, x in network.state_dict().items()
    if not name.endswith('num_batches_tracked')
  }
  network.double().eval()
  arrays = weights_case.draw(shapes)
  network.load_state_dict(
    {name: torch.tensor(x) for name, x in arrays.items()}, strict=False
  )
  images = torch.tensor(weights_case.images().transpose(0, 3, 1, 2).copy())
  return shapes, {'logits': network(images).detach().numpy()}


def run_pytorchcv():
  from pytorchcv.models.bninception import bninception

  return run_torch(bninception())


def run_cadene():
  # The package itself imports torchvision, which this file does not need.
  package = importlib.util.find_spec('pretrainedmodels')
  folder = Path(package.submodule_search_locations[0])
  spec = importlib.util.spec_from_file_location(
    'bninception', folder / 'models/bninception.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return run_torch(module.BNInception())


def run_slim():
  """The same by TF-Slim; the outputs of its end points too."""
  os.environ['TF_USE_LEGACY_KERAS'] = '1'
  # TensorFlow looks for it where it was in older versions of tf_keras.
  from tf_keras.src import legacy_tf_layers
  from tf_keras.src.legacy_tf_layers import (
    base,
    convolutional,
    core,
    normalization,
    pooling,
  )

  for module in (
    legacy_tf_layers,
    base,
    convolutional,
    core,
    normalization,
    pooling,
  ):
    sys.modules[module.__name__.replace('.src', '')] = module
  import tensorflow.compat.v1 as tf
  import tf_slim
  from tf_slim.nets import inception_v2

  tf.disable_eager_execution()
  images = tf.constant(weights_case.images())
  with tf_slim.arg_scope(inception_v2.inception_v2_arg_scope()):
    logits, end_points = inception_v2.inception_v2(
      images, 1001, is_training=False
    )
  variables = {x.op.name: x for x in tf.global_variables()}
  shapes = {name: x.shape.as_list() for name, x in variables.items()}
  with tf.Session() as session:
    for name, array in weights_case.draw(shapes).items():
      variables[name].load(array, session)
    found = session.run({**end_points, 'logits': logits})
  return shapes, found


if __name__ == '__main__':
  (source,) = sys.argv[1:]
  shapes, outputs = globals()[f'run_{source}']()
  # Those of pooling are not outputs of a module of ours.
  maps = {
    name: x for name, x in outputs.items() if x.ndim == 4 and 'Pool' not in name
  }
  np.savez_compressed(
    HERE / f'inference/weights_{source}.npz',
    shapes=json.dumps(shapes),
    logits=outputs['logits'],
    map_names=list(maps),
    maps=torch_case.projections(maps.values()),
  )
