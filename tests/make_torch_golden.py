"""Writes the golden files of `torch_test.py`, by PyTorch.

  pip install --no-deps pytorchcv==0.0.74
  python tests/make_torch_golden.py

The small net is that of `scripts/benchmarks/torch_steps.py`, of PyTorch's own
layers, and trained by its own SGD; the full one is `bninception` of pytorchcv.
Neither shares a line of the network, the loss or the optimizer with this
project: only the table of channels and the values that go in.
"""

from pathlib import Path
import sys

import numpy as np
from pytorchcv.models.bninception import bninception
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / 'scripts')]

from benchmarks.torch_steps import Net
import torch_case

from bn_repro import config as config_lib

torch.set_default_dtype(torch.float64)


def layers_of(module):
  """Convolutions, BN layers and the classifier, in the order of the pass."""
  found = list(module.modules())
  return (
    [m for m in found if isinstance(m, nn.Conv2d)],
    [m for m in found if isinstance(m, nn.BatchNorm2d)],
    [m for m in found if isinstance(m, nn.Linear)][-1],
  )


def weights_of(module):
  convs, norms, classifier = layers_of(module)
  found = []
  for conv, norm in zip(convs, norms, strict=True):
    found += [conv.weight, norm.weight, norm.bias]
  return [*found, classifier.weight, classifier.bias]


def to_jax(x):
  """A kernel as Flax has it: (height, width, inputs, outputs)."""
  x = x.detach().numpy()
  return {4: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x, 2: x.T}.get(
    x.ndim, x
  )


def load(module, variables):
  """Gives a module our values."""
  values = torch_case.leaves(variables['params'])
  for weight, value in zip(weights_of(module), values, strict=True):
    if value.ndim == 4:
      value = value.transpose(3, 2, 0, 1)
    elif value.ndim == 2:
      value = value.T
    assert weight.shape == value.shape
    weight.data = torch.tensor(np.ascontiguousarray(value))
  values = iter(torch_case.statistics(variables['batch_stats']))
  for norm in layers_of(module)[1]:
    norm.running_mean = torch.tensor(next(values))
    norm.running_var = torch.tensor(next(values))


def shapes_of(module):
  """The shapes that `draw_variables` wants, from a module of PyTorch."""
  convs, _, classifier = layers_of(module)
  params = {}
  for path, conv in zip(torch_case.unit_paths(), convs, strict=True):
    tree = params
    for name in path:
      tree = tree.setdefault(name, {})
    outputs, inputs, height, width = conv.weight.shape
    kernel = np.empty((height, width, inputs, outputs))
    tree['conv'] = {'kernel': kernel}
  params['classifier'] = {'kernel': np.empty(classifier.weight.shape[::-1])}
  return {'params': params}


def statistics_of(module):
  return [
    x.numpy()
    for norm in layers_of(module)[1]
    for x in (norm.running_mean, norm.running_var)
  ]


def normalized(images):
  """(batch, 3, height, width) in [-1, 1]."""
  return torch.tensor(images.transpose(0, 3, 1, 2) / 127.5 - 1)


def gradients_of(module):
  return [to_jax(weight.grad) for weight in weights_of(module)]


def train_small():
  """Ten steps of momentum SGD with L2 on the kernels alone."""
  config = config_lib.load('configs/bn_baseline.py:mini', torch_case.SMALL)
  net = Net(config, 10)
  load(net, torch_case.draw_variables(shapes_of(net)))
  kernels = [w for w in weights_of(net) if w.ndim > 1]
  others = [w for w in weights_of(net) if w.ndim == 1]
  optimizer = torch.optim.SGD(
    [
      {'params': kernels, 'weight_decay': config.optim.weight_decay},
      {'params': others},
    ],
    lr=config.optim.learning_rate,
    momentum=config.optim.momentum,
  )
  losses, first = [], None
  for images, labels in torch_case.batches(torch_case.NUM_STEPS, 32, 32, 10):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(
      net(normalized(images)), torch.tensor(labels, dtype=torch.int64)
    )
    loss.backward()
    if first is None:
      first = torch_case.projections(gradients_of(net))
    optimizer.step()
    losses.append(loss.item())
  net.eval()
  ((images, _),) = torch_case.batches(1, 32, 32, 10)
  return {
    'losses': np.array(losses),
    'first_gradients': first,
    'params': torch_case.projections(map(to_jax, weights_of(net))),
    'batch_stats': torch_case.projections(statistics_of(net)),
    'logits': net(normalized(images)).detach().numpy(),
  }


def run_full():
  """Both modes of pytorchcv's network on two images of 224 pixels."""
  net = bninception().double()
  load(net, torch_case.draw_variables(shapes_of(net)))
  ((images, labels),) = torch_case.batches(1, 2, 224, 1000)
  net.eval()
  inference = net(normalized(images)).detach().numpy()
  net.train()
  logits = net(normalized(images))
  loss = nn.functional.cross_entropy(
    logits, torch.tensor(labels, dtype=torch.int64)
  )
  loss.backward()
  return {
    'inference': inference,
    'training': logits.detach().numpy(),
    'loss': np.array(loss.item()),
    'gradients': torch_case.projections(gradients_of(net)),
    'batch_stats': torch_case.projections(statistics_of(net)),
  }


if __name__ == '__main__':
  np.savez_compressed(HERE / 'torch_small.npz', **train_small())
  np.savez_compressed(HERE / 'torch_full.npz', **run_full())
