"""The training steps that `scripts/benchmark.py torch` compares.

  python scripts/benchmarks/torch_steps.py PIPELINE CORES

PIPELINE is `ours`, or PyTorch with the memory format `contiguous` (NCHW) or
`channels_last` (NHWC). All train the same network: BN-Baseline in `mini`,
without dropout and with PyTorch's padding. The process runs on that many cores.
For each number N on standard input it makes N steps and prints a line of JSON:
the wall time and the CPU time of all cores, in seconds.
"""

import argparse
from collections.abc import Callable
import json
import os
from pathlib import Path
import sys
import time
from typing import Any

from ml_collections import ConfigDict
import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

# JAX is imported only by the pipeline `ours`.
from bn_repro import config as config_lib
from bn_repro.data import datasets
from bn_repro.models import inception_table

# What both frameworks can do: their dropout masks differ.
OVERRIDES = (
  'model.reading=608',
  'model.padding=torch',
  'model.dropout_rate=0',
)


class Unit(nn.Module):
  """Convolution, batch normalization, ReLU."""

  def __init__(
    self, inputs: int, outputs: int, kernel: int, stride: int, epsilon: float
  ):
    """Creates the layers."""
    super().__init__()
    self.conv = nn.Conv2d(
      inputs, outputs, kernel, stride, kernel // 2, bias=False
    )
    self.bn = nn.BatchNorm2d(outputs, eps=epsilon, momentum=0.1)

  def forward(self, x: Any) -> Any:
    """Maps (batch, channels, height, width)."""
    return torch.relu(self.bn(self.conv(x)))


class Block(nn.Module):
  """A row of the table."""

  def __init__(self, inputs: int, row: inception_table.Row, epsilon: float):
    """Creates the layers."""
    super().__init__()
    stride = row.stride

    def unit(
      inputs: int, outputs: int, kernel: int = 1, stride: int = 1
    ) -> Unit:
      return Unit(inputs, outputs, kernel, stride, epsilon)

    branches = []
    if row.conv_1x1:
      branches.append(unit(inputs, row.conv_1x1))
    branches.append(
      nn.Sequential(
        unit(inputs, row.reduce_3x3),
        unit(row.reduce_3x3, row.conv_3x3, 3, stride),
      )
    )
    branches.append(
      nn.Sequential(
        unit(inputs, row.reduce_double),
        unit(row.reduce_double, row.conv_double, 3),
        unit(row.conv_double, row.conv_double, 3, stride),
      )
    )
    if row.pool == 'avg':
      pool = nn.AvgPool2d(3, 1, 1)
    elif stride == 2:
      pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    else:
      pool = nn.MaxPool2d(3, 1, 1)
    last = [unit(inputs, row.projection)] if row.projection else []
    branches.append(nn.Sequential(pool, *last))
    self.branches = nn.ModuleList(branches)

  def forward(self, x: Any) -> Any:
    """Maps (batch, channels, height, width)."""
    return torch.cat([branch(x) for branch in self.branches], 1)


class Net(nn.Module):
  """BN-Baseline in `mini`, with `OVERRIDES`."""

  def __init__(self, config: ConfigDict, num_classes: int):
    """Creates the layers."""
    super().__init__()
    width, epsilon = config.model.width, config.bn.epsilon
    first, reduce, second = (
      round(width * channels) for channels in (64, 64, 192)
    )
    self.conv1 = Unit(3, first, config.model.stem_kernel, 2, epsilon)
    self.conv2_reduce = Unit(first, reduce, 1, 1, epsilon)
    self.conv2 = Unit(reduce, second, 3, 1, epsilon)
    # PyTorch divides alpha by the window, as Caffe does.
    self.lrn = nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0)
    blocks = []
    inputs = second
    for row in inception_table.rows('608'):
      row = row.scaled(width)
      blocks.append(Block(inputs, row, epsilon))
      rest = row.projection or inputs
      inputs = row.conv_1x1 + row.conv_3x3 + row.conv_double + rest
    self.blocks = nn.Sequential(*blocks)
    self.classifier = nn.Linear(inputs, num_classes)

  def forward(self, x: Any) -> Any:
    """Maps (batch, channels, height, width)."""
    x = self.conv2_reduce(self.lrn(self.conv1(x)))
    x = self.lrn(self.conv2(x))
    x = nn.functional.max_pool2d(x, 3, 2, ceil_mode=True)
    return self.classifier(self.blocks(x).mean((2, 3)))


def ours(config: ConfigDict) -> Callable[[int], None]:
  """Creates a function that makes a number of steps of this repository."""
  from bn_repro import cli

  dataset = datasets.check(config)
  cli.set_up_jax(config)
  import jax

  from bn_repro import parallel
  from bn_repro.training.experiment import create_experiment

  experiment = create_experiment(config, dataset)
  batches = next(experiment.stacked_batches(0, 1))
  state = parallel.replicate(experiment.mesh, experiment.initial_state())
  step = experiment.lower('train_steps', state).compile()

  def run(count: int) -> None:
    nonlocal state
    for _ in range(count):
      state, _ = step(state, batches)
    jax.block_until_ready(state)

  return run


def pytorch(config: ConfigDict, memory_format: str) -> Callable[[int], None]:
  """Creates a function that makes a number of steps of PyTorch.

  Args:
    config: a config in `mini` with `OVERRIDES`.
    memory_format: contiguous or channels_last.
  """
  layout = {
    'contiguous': torch.contiguous_format,
    'channels_last': torch.channels_last,
  }[memory_format]
  net = Net(config, 10).to(memory_format=layout)
  kernels = [weight for weight in net.parameters() if weight.ndim > 1]
  others = [weight for weight in net.parameters() if weight.ndim == 1]
  optimizer = torch.optim.SGD(
    [
      {'params': kernels, 'weight_decay': config.optim.weight_decay},
      {'params': others},
    ],
    lr=config.optim.learning_rate,
    momentum=config.optim.momentum,
  )
  size = config.data.image_size
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (config.batch_size, 3, size, size), np.uint8)
  labels = torch.tensor(rng.integers(0, 10, config.batch_size))
  images = torch.tensor(pixels).to(memory_format=layout)

  def run(count: int) -> None:
    for _ in range(count):
      optimizer.zero_grad()
      logits = net(images.float() / 127.5 - 1)
      nn.functional.cross_entropy(logits, labels).backward()
      optimizer.step()

  return run


def main() -> None:
  """Runs the command."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('name', choices=('ours', 'contiguous', 'channels_last'))
  parser.add_argument('cores', type=int)
  flags = parser.parse_args()
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.cores])
  torch.set_num_threads(flags.cores)
  config = config_lib.load('bn_baseline:mini', OVERRIDES)
  run = ours(config) if flags.name == 'ours' else pytorch(config, flags.name)
  for line in sys.stdin:
    cpu, wall = time.process_time(), time.perf_counter()
    run(int(line))
    times = {
      'wall': time.perf_counter() - wall,
      'cpu': time.process_time() - cpu,
    }
    print(json.dumps(times), flush=True)


if __name__ == '__main__':
  main()
