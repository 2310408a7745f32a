"""Evaluates a model file on one or several crops of each image of a split."""

from collections.abc import Sequence
from pathlib import Path
import sys
from typing import Any

from ml_collections import ConfigDict

from bn_repro import cli, config_fields, host
from bn_repro import config as config_lib
from bn_repro.data import datasets
from bn_repro.data.split import Dataset, Split, overlap
from bn_repro.errors import UserError
from bn_repro.inference import crops as crops_lib
from bn_repro.inference import forward, multi_crop
from bn_repro.inference import real_labels as real_labels_lib
from bn_repro.runtime.workdir import Workdir
from bn_repro.training import model_file
from bn_repro.training.model_file import ModelFile


def evaluate_model(
  workdir: Workdir,
  split: str,
  crops: int,
  overrides: Sequence[str],
  path: Path | None,
  *,
  other_data: bool,
  count_overlap: bool,
  real_labels: Path | None,
) -> dict[str, Any]:
  """Evaluates every image of a split once, and prints what it evaluates.

  Args:
    workdir: the workdir of a model file.
    split: value of --split; empty for `eval_split` of the model's config.
    crops: number of crops of each image; see `crops.COUNTS`.
    overrides: assignments to fields of `data`, such as 'data.name=mnist'. They
      describe other data, unless a resumed run may change the fields as well.
    path: file of class probabilities to write and to resume. None names a file
      in the workdir, or with one crop none.
    other_data: accept data that differ from those of the training.
    count_overlap: count the images that are training images as well.
    real_labels: file of the labels of `real_labels.read`, for a further line;
      None for none.

  Returns:
    A line of metrics, with `crops`, and with the `step` of the model if it is
    known.

  Raises:
    UserError: if the model or the data cannot be used.
  """
  real = None if real_labels is None else real_labels_lib.read(real_labels)
  model = model_file.read(workdir.model)
  config = config_lib.override(model.config, overrides)
  dataset = datasets.load(config.data, config.seed)
  split = datasets.choose_split(dataset, config, split)
  images = dataset.splits[split]
  other_data = other_data or any(
    x.partition('=')[0] not in config_fields.CHANGEABLE for x in overrides
  )
  _check_data(model, dataset, workdir.path, other_data=other_data)
  if real is not None:
    real_labels_lib.check_split(images)
  if path is None and crops > 1:
    path = workdir.path / 'probabilities' / f'{split}-{crops}.npz'
  known = {
    'step': (model.facts.get('evaluation') or {}).get('step'),
    'statistics': model.facts.get('statistics'),
  }
  print(f'{workdir.model}: {_describe(**known)}', flush=True)
  if crops > 1:
    print(_describe_crops(crops, model.image_shape[0]), flush=True)
  if images.image_shape[2] != model.image_shape[2]:
    kinds = {1: 'gray', 3: 'color'}
    own, wanted = (kinds[x.image_shape[2]] for x in (images, model))
    print(f'{own} images are converted to {wanted}', flush=True)
  if count_overlap:
    is_own = dataset.fingerprint == model.facts.get('data_fingerprint')
    training = config if is_own else model.config  # Own data may have moved.
    print(_describe_overlap(training, images), flush=True)
  cli.set_up_jax(config)
  found = multi_crop.compute(
    forward.create_predict(model),
    images,
    {
      'model_digest': model.digest,
      'model': workdir.path.name,
      'statistics': known['statistics'],
      'data_fingerprint': dataset.fingerprint,
      'data_name': config.data.name,
      'split': split,
      'crops': crops,
      'label_names': list(model.label_names),
      'image_size': model.image_shape[0],
      'evaluation_box': None if crops > 1 else config.data.evaluation_box,
    },
    model.image_shape,
    path,
    num_threads=config.data.num_threads or host.num_cores(),
    max_replaced=config.data.max_replaced,
  )
  if path is not None:
    print(f'class probabilities: {path}', flush=True)
  if real is not None:
    predictions = found.probabilities.argmax(1)
    correct, total = real_labels_lib.count_correct(predictions, images, real)
    print(
      f'ReaL labels: accuracy {correct / total:.4f} ({total:,} images, '
      f'{len(images) - total:,} without a label left out)'
    )
  return {**known, 'split': split, 'crops': crops, **found.metrics()}


def _check_data(
  model: ModelFile, dataset: Dataset, path: Path, *, other_data: bool
) -> None:
  """Compares the data to evaluate with those of the training.

  Raises:
    UserError: if the number or the order of classes differs, or the data do
      and `other_data` is False.
  """
  trained = model.facts.get('data_fingerprint')  # Imported weights have none.
  if trained and trained != dataset.fingerprint and not other_data:
    raise UserError(
      f'--workdir={path}: trained on data with the fingerprint {trained}, and '
      f'these data have {dataset.fingerprint}. Name the folder of the data '
      'with --data_dir, or pass --other_data to evaluate on these.'
    )
  datasets.check_num_classes(dataset, len(model.label_names), path)
  names = list(model.label_names), list(dataset.label_names)
  if names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
    raise UserError(
      f'--workdir={path}: the data have the classes of the network in another '
      f'order ({", ".join(names[1][:5])}, not {", ".join(names[0][:5])}). Give '
      'them the labels of the network.'
    )
  for label, (own, name) in enumerate(
    zip(model.label_names, dataset.label_names, strict=True)
  ):
    if own != name:
      print(
        f"warning: label {label} is '{own}' in the network and '{name}' in the "
        'data. The accuracy assumes that they are the same.',
        file=sys.stderr,
      )
      break


def _describe_overlap(training: ConfigDict, images: Split) -> str:
  """Counts the images that the network was trained on.

  Args:
    training: a config of the training data.
    images: the split to evaluate.

  Raises:
    UserError: if the training data are missing, or stored in another form.
  """
  training = config_lib.override(training, ['data.distorted_copies=0'])
  train = datasets.load(training.data, training.seed).splits['train']
  forms = [(x.in_memory, x.image_shape) for x in (train, images)]
  if forms[0] != forms[1]:
    raise UserError(
      '--overlap: only equal files or equal pixels are found, and the training '
      f'images, of {training.data.name}, are stored in another form than these.'
    )
  count = overlap(train, images)
  return f'{count} of {len(images)} images are training images as well'


def _describe(step: int | None, statistics: str | None) -> str:
  return ('weights without a step' if step is None else f'step {step}') + (
    f', {statistics} statistics' if statistics else ', without BN'
  )


def _describe_crops(crops: int, size: int) -> str:
  sides = ', '.join(map(str, crops_lib.shorter_sides(crops, size)))
  scaled = '' if size == 224 else f' (those for 224 pixels times {size}/224)'
  return (
    f'{crops} crops of {size}x{size} pixels, of images with shorter sides '
    f'{sides}{scaled}'
  )
