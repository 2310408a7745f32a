"""Which statistics, and which batch?

Networks train with statistics of groups of a batch. They are tested with moving
averages, with population statistics (Algorithm 2) of N training images, or with
those of groups of test images. Published: N from 10^3 to 10^4 suffices; moving
averages are noisier with large batches (Wu and Johnson, 2021); small groups
train worse, and Batch Renorm better in them (Ioffe, 2017).
"""

from collections.abc import Sequence
import functools
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from bn_repro.data import datasets
from bn_repro.errors import UserError
from bn_repro.lab.findings import Finding, Result
from bn_repro.lab.inference_statistics import accuracies
from bn_repro.lab.small_network import BN, RENORM, SmallNetwork, train
from bn_repro.report import drawing

# The groups to compare, 4 and 32, and 0.5 points are our choice.
FINDINGS = (
  Finding(
    'Population statistics of 10,000 images are as good as those of all.',
    'Wu and Johnson 2021: 1,000 to 10,000 suffice',
    lambda result: max(abs(a[-1] - a[-2]) for a in result['networks'].values()),
    high=0.5,
    unit=' points apart',
  ),
  Finding(
    'Moving averages are noisier with large batches.',
    'Wu and Johnson 2021',
    lambda result: result['noise'][1] - result['noise'][0],
    low=0,
    unit=' points noisier',
  ),
  Finding(
    'Groups of 4 train worse than groups of 32.',
    'Ioffe 2017; Wu and Johnson 2021',
    lambda result: _gain(result, f'{BN} 32', f'{BN} 4'),
    low=0,
    unit=' points worse',
  ),
  Finding(
    'In groups of 4, Batch Renorm is better than BN.',
    'Ioffe 2017',
    lambda result: _gain(result, f'{RENORM} 4', f'{BN} 4'),
    low=0,
    unit=' points better',
  ),
)


def _gain(result: Result, better: str, worse: str) -> float:
  return result['networks'][better][0] - result['networks'][worse][0]


def check(config: ConfigDict) -> None:
  """Checks that groups are full, and that all figures are defined.

  Raises:
    UserError: if not, or if there are no such data.
  """
  groups, counts = _numbers(config.groups), _numbers(config.images)
  small, large = config.batch_size, config.large_batch_size
  sizes = (*groups, *counts, small, large)
  full = all(size > 1 and size.bit_count() == 1 for size in sizes)
  if not (full and {4, 32} <= {*groups} and max(groups) <= small < large):
    raise UserError(
      'config: groups, images, batch_size and large_batch_size must be powers '
      'of 2; groups have 4, 32 and none above batch_size < large_batch_size.'
    )
  if datasets.find(config.data.name).num_classes != 10:
    raise UserError('config.data.name: use fashion_mnist, mnist or mnist_5k.')
  images = len(datasets.load(config.data, seed=0).splits['train'])
  steps = int(config.epochs * images) // large
  if max(counts) > images or not 1 <= config.marks <= steps:
    raise UserError(
      f'config: images must be at most the {images} of the training, and marks '
      f'from 1 to its {steps} steps with large_batch_size.'
    )


def _numbers(text: str) -> list[int]:  # '4,32'; 0 for what is no number.
  return [int(n) if n.isdecimal() else 0 for n in text.split(',')]


def run(config: ConfigDict, seed: int) -> Result:
  """Accuracies of networks, and the noise of moving averages, in percent.

  The noise is the mean distance of accuracies with moving averages from those
  with population statistics, in the later half of `config.marks` times of a
  training: the averages have forgotten their start by then.
  """
  splits, size = datasets.load(config.data, seed).splits, config.batch_size
  counts = [*_numbers(config.images), len(splits['train']) // size * size]
  learn = functools.partial(train, config=config, splits=splits, seed=seed)
  test = functools.partial(accuracies, splits=splits, seed=seed, size=size)
  networks, noise = {}, []
  for norm, group in [(BN, n) for n in _numbers(config.groups)] + [(RENORM, 4)]:
    network = SmallNetwork(norm, group, config.bn_momentum, config.model.dtype)
    *_, last = learn(network, size=size)
    networks[f'{norm} {group}'] = test(network, last, counts=counts)
  network = SmallNetwork(BN, 32, config.bn_momentum, config.model.dtype)
  for batch_size in (size, config.large_batch_size):
    course = [*learn(network, size=batch_size)][config.marks // 2 :]
    found = [test(network, now, counts=counts[-2:-1]) for now in course]
    noise.append(float(np.mean([abs(exact - now) for now, _, exact in found])))
  return {'counts': counts, 'networks': networks, 'noise': noise}


def table(results: Sequence[Result]) -> str:
  """Median accuracies, by network and statistics, and the noise."""
  heads = ['groups', 'moving averages', 'mini-batch']
  heads += [f'{count:,} images' for count in results[0]['counts']]
  lines = [f'| {" | ".join(heads)} |', '|---' * len(heads) + '|']
  for name in results[0]['networks']:
    medians = np.median([r['networks'][name] for r in results], axis=0)
    lines.append(f'| {name} | {" | ".join(f"{v:.2f}" for v in medians)} |')
  noise = np.median([result['noise'] for result in results], axis=0)
  lines.append('\nNoise: {:.2f}; with large batches {:.2f}.'.format(*noise))
  return ''.join(f'{line}\n' for line in lines)


def draw(results: Sequence[Result]) -> Any:
  """Accuracies by number of images, and by size of groups."""
  figure, (top, bottom) = drawing.plt.subplots(
    2, 1, figsize=(drawing.WIDTH, 7), layout='constrained'
  )
  names, counts = [*results[0]['networks']], results[0]['counts']
  found = {n: np.transpose([r['networks'][n] for r in results]) for n in names}
  groups, renorm = names[:-1], np.median(found[names[-1]][0])
  styles = drawing.styles([None] * (len(groups) + 3))
  for name, style in zip(groups, styles, strict=False):
    drawing.draw_spread(top, counts, [*found[name][2:]], style, name)
  places, sizes = range(len(groups)), [name.split()[-1] for name in groups]
  kinds = {'moving averages': 0, 'mini-batch': 1, 'all images': -1}
  for (kind, row), style in zip(kinds.items(), styles[-3:], strict=True):
    values = [found[name][row] for name in groups]
    drawing.draw_spread(bottom, places, values, style, f'{BN}, {kind}')
  bottom.plot(sizes.index('4'), renorm, label=RENORM, **drawing.MATCH)
  top.set(xscale='log', xlabel='images of population statistics')
  bottom.set(xlabel='images of a group', xticks=places, xticklabels=sizes)
  for axes in (top, bottom):
    axes.set_ylabel('accuracy (%)')
    axes.legend(ncols=2)
  return figure
