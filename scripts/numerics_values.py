"""Results of the code on one CPU device, as numbers: see numerics.py.

Networks compute in float64, where machines differ least.
"""

from collections.abc import Iterator
from typing import Any

import cv2
import jax
import numpy as np

from bn_repro import config as config_lib
from bn_repro import parallel
from bn_repro.data import crops, datasets, encoded_split, input_pipeline
from bn_repro.training import evaluation, steps
from bn_repro.training.experiment import Experiment, create_experiment

Values = dict[str, list[Any]]

# Training steps, and the images of each evaluation. Rounding grows with every
# step.
NUM_STEPS = 4
NUM_EVALUATED = 40

_ALL = (
  'model.dtype=float64',
  'steps_per_call=1',
  'total_steps=100',
  'eval_split=validation',
  f'data.holdout={NUM_EVALUATED}',
)
_INCEPTION = ('model.name=inception_tiny', 'batch_size=8')
# One step of decay, after the second of `NUM_STEPS`.
_DECAY = ('optim.decay_rate=0.5', 'optim.decay_epochs=0.004')
# The digits themselves: making `distorted_copies` may round a pixel otherwise.
_MLP = ('data.distorted_copies=0', 'batch_size=20')

# A config in `mini`, and its overrides. Constants that would hardly show after
# `NUM_STEPS` are larger than in the configs.
NETWORKS = {
  'inception': (
    *_INCEPTION,
    'model.stem=separable',
    'data.distortion=reduced',
    'optim.weight_decay=0.1',
    *_DECAY,
  ),
  'bn_x5': (
    *_INCEPTION,
    'bn.statistics=group',
    'bn.virtual_batch_size=4',
    'bn.per_activation=true',
    'bn.population_batches=2',
    'data.distortion=full',
  ),
  'mnist': (
    *_MLP,
    'model.nonlinearity=relu',
    'model.init_scale=2.0',
    'optim.polyak_decay=0.75',
  ),
  'bn_mnist': (
    *_MLP,
    'bn.epsilon=0.01',
    'bn.momentum=0.75',
    'bn.population_batches=3',
    'optim.momentum=0.9',
    'optim.learning_rate=0.5',
  ),
}


def compute() -> Values:
  """All values by name; JAX must have 64-bit types."""
  mesh = parallel.create_mesh(jax.devices()[:1])
  values: Values = {}
  for name in NETWORKS:
    values |= _network(name, mesh)
  return values | _order() | _distortion(mesh) | _copies() | _jpeg_crops()


def _network(name: str, mesh: jax.sharding.Mesh) -> Values:
  """Training and evaluation of one of `NETWORKS`."""
  config = config_lib.load(f'{name}:mini', (*_ALL, *NETWORKS[name]))
  experiment = create_experiment(config, datasets.check(config), mesh)
  state = parallel.replicate(mesh, experiment.initial_state())
  values = {
    f'{name}/initial_norms': _norms(state),
    f'{name}/learning_rates': [
      experiment.learning_rate(step) for step in range(NUM_STEPS)
    ],
  }
  losses = []
  for batches in experiment.stacked_batches(0, NUM_STEPS):
    state, sums = experiment.steps.train_steps(state, batches)
    losses += [step.means()['loss'] for step in sums.fetch_steps()]
  values |= {
    f'{name}/training_losses': losses,
    f'{name}/trained_norms': _norms(state),
  }
  return values | dict(_evaluations(name, experiment, state))


def _evaluations(
  name: str, experiment: Experiment, state: steps.TrainState
) -> Iterator[tuple[str, list[Any]]]:
  modes = evaluation.statistics_modes(experiment)
  wanted = {mode: ['validation'] for mode in modes}
  for line, inference in evaluation.evaluate(
    experiment, state, wanted, check=lambda: None
  ):
    statistics = line.get('statistics', 'evaluation')
    yield f'{name}/{statistics}_loss', [line['loss']]
    yield f'{name}/{statistics}_norms', _norms(inference)
    for probe, (_, medians, _) in line.get('percentiles', {}).items():
      yield f'{name}/{statistics}_median_{probe}', medians[:3]


def _norms(state: steps.TrainState) -> list[float]:
  """The norms of all kernels, biases, scales, means and variances together."""
  squares: dict[str, float] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    (state.params, state.batch_stats)
  ):
    kind = path[-1].key
    square = float(np.square(leaf, dtype=np.float64).sum())
    squares[kind] = squares.get(kind, 0) + square
  kinds = ('kernel', 'bias', 'scale', 'mean', 'var')
  return [squares[kind] ** 0.5 for kind in kinds if kind in squares]


def _order() -> Values:
  """Examples of an epoch of 11, and of the beginning of the next one."""
  values = {}
  for shuffle in ('none', 'within_shard', 'global'):
    order = input_pipeline.ExampleOrder(
      11, num_shards=4, shuffle=shuffle, seed=5
    )
    values[f'order/{shuffle}'] = order.examples(np.arange(18)).tolist()
  return values


def _picture(height: int, width: int) -> np.ndarray:
  """A smooth picture in color without symmetry, uint8 (height, width, 3)."""
  y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
  colors = [x, y, 0.5 + 0.4 * np.sin(9 * x * y)]
  return (20 + 220 * np.stack(colors, axis=-1)).astype(np.uint8)


def _means(image: np.ndarray) -> list[float]:
  """The mean of each channel in each quarter of an image, row by row."""
  height, width = image.shape[0] // 2, image.shape[1] // 2
  quarters = image[: 2 * height, : 2 * width].reshape(2, height, 2, width, -1)
  return quarters.mean((1, 3), dtype=np.float64).ravel().tolist()


def _distortion(mesh: jax.sharding.Mesh) -> Values:
  """The same picture, distorted four times at each strength.

  The picture is small, so that few pixels are averaged.
  """
  images = np.stack([_picture(6, 4)] * 4)
  values: Values = {}
  for strength in ('reduced', 'full'):

    def distort(
      seed_and_step: Any, images: Any, strength: str = strength
    ) -> Any:
      seed, step = seed_and_step
      return steps.distorted_images(images, seed, step, strength)

    distorted = parallel.data_parallel(distort, mesh, donate_state=False)(
      (np.uint32(5), np.int32(7)), images
    )
    values |= {
      f'distortion/{strength}_{number}': _means(image)
      for number, image in enumerate(np.asarray(distorted))
    }
  return values


def _copies() -> Values:
  """Affine copies of digits, which `data.distorted_copies` makes."""
  config = config_lib.load(
    'mnist:mini', ['data.distorted_copies=3', 'data.binarize=false', 'seed=5']
  )
  split = datasets.load(config.data, config.seed).splits['train']
  images = split.evaluation_batch(np.arange(3))['image']
  return {f'copies/{i}': _means(image) for i, image in enumerate(images)}


def _jpeg_crops() -> Values:
  """Views of a JPEG: four of training, mirrored or not, and the two others."""
  _, encoded = cv2.imencode('.jpg', _picture(96, 128))
  example = {'image': encoded.tobytes(), 'label': 0, 'file_name': 'picture'}
  values = {}
  for name, box in crops.EVALUATION_BOXES.items():
    split = _encoded_split(example, box)
    (image,) = split.evaluation_batch(np.zeros(1, np.int64))['image']
    values[f'jpeg/{name}'] = _means(image)
  images = split.training_batch(
    np.zeros(4, np.int64), crops.CropRandomness(5, np.arange(70, 74))
  )['image']
  return values | {
    f'jpeg/training_{number}': _means(image)
    for number, image in enumerate(images)
  }


def _encoded_split(
  example: dict[str, Any], box: crops.ChooseBox
) -> encoded_split.EncodedSplit:
  return encoded_split.EncodedSplit(
    source=[example],
    indices=np.zeros(1, np.int64),
    labels=None,
    num_classes=1,
    image_size=32,
    num_threads=1,
    evaluation_box=box,
    as_shown=False,
    identity='',
  )
