"""Lists the training examples of a step, and draws what the network sees.

  python -m bn_repro.examples --config=configs/bn_x5.py --step=10000
  python -m bn_repro.examples --workdir=runs/bn_x5 --step=500 --sheet=500.png

The order of examples is a function of (seed, step, batch size), so that any
step can be listed, whether or not a run has reached it. The contact sheet shows
the images of the step as the network sees them, cropped, mirrored and
distorted, and images of the evaluation split, with the names of their classes.
An image that cannot be decoded is listed; as in training, the next one that can
be is drawn in its place.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from bn_repro import cli, files
from bn_repro import config as config_lib
from bn_repro.data import datasets
from bn_repro.data.split import Dataset
from bn_repro.errors import UserError
from bn_repro.runtime import streams

# Largest number of images from each split on a contact sheet.
SHEET_IMAGES = 48


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = cli.Parser(
    prog='python -m bn_repro.examples',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  cli.add_config_arguments(parser, required=False)
  files.add_path_argument(
    parser,
    '--workdir',
    help='workdir of a run, instead of --config',
  )
  parser.add_argument(
    '--step',
    type=int,
    default=0,
    help='number of updates before the step; 0, the default, is the first step',
  )
  files.add_path_argument(
    parser,
    '--sheet',
    metavar='PNG',
    help='file for a contact sheet',
  )
  try:
    flags, overrides = cli.parse_arguments(
      sys.argv[1:] if argv is None else argv, parser
    )
    if bool(flags.config) == bool(flags.workdir):
      raise UserError('give either --config or --workdir. Try --help.')
    if flags.workdir and overrides:
      raise UserError('--config.KEY goes with --config, not with --workdir.')
    if flags.step < 0:
      raise UserError(f'--step={flags.step}: must be at least 0.')
    config = (
      cli.read_config(flags.workdir)
      if flags.workdir
      else config_lib.load(flags.config, overrides)
    )
    dataset = datasets.check(config)
    if flags.sheet:
      streams.make_output_optional()
    for line in _table(config, dataset, flags.step):
      print(line)
    if flags.sheet:
      _draw(config, dataset, flags.step, flags.sheet)
      print(f'drawn: {flags.sheet}')
  except UserError as error:
    return cli.report_user_error(error)
  return 0


def _table(config: ConfigDict, dataset: Dataset, step: int) -> list[str]:
  """Returns the lines of a table of a step's examples."""
  from bn_repro.data import input_pipeline  # Grain takes a second to import.

  split = dataset.splits['train']
  positions = input_pipeline.positions(step, config.batch_size)
  examples = input_pipeline.create_order(config, len(split)).examples(positions)
  rows: list[tuple[str, ...]] = [
    ('epoch', 'position', 'example', 'label', 'class', 'file')
  ]
  for position, example in zip(positions, examples, strict=True):
    epoch, offset = divmod(int(position), len(split))
    label = split.label_of(example)
    name = dataset.label_names[label]
    numbers = (f'{n}' for n in (epoch, offset, example, label))
    rows.append((*numbers, name, split.name_of(example)))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    '  '.join(
      text.rjust(width) if index < 4 else text.ljust(width)
      for index, (text, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]


def _draw(config: ConfigDict, dataset: Dataset, step: int, path: Path) -> None:
  """Draws the contact sheet."""
  cli.set_up_jax(config)
  import jax

  from bn_repro import parallel
  from bn_repro.data import input_pipeline
  from bn_repro.report import figures
  from bn_repro.training import steps

  train, shown = dataset.splits['train'], dataset.splits[config.eval_split]
  order = input_pipeline.create_order(config, len(train))
  batch = next(
    input_pipeline.train_batches(
      train, order, config.batch_size, step, step + 1
    )
  )

  def distort(seed_and_step: Any, batch: Any) -> Any:
    seed, step = seed_and_step
    return steps.distorted_images(
      batch['image'], seed, step, config.data.distortion
    )

  # One device suffices: distortions do not depend on the number of devices.
  mesh = parallel.create_mesh(jax.local_devices()[:1])
  distorted = parallel.data_parallel(distort, mesh, donate_state=False)(
    (np.uint32(config.seed), np.int32(step)), batch
  )
  chosen = np.linspace(
    0, len(shown) - 1, min(len(shown), SHEET_IMAGES), dtype=np.int64
  )
  evaluated = shown.evaluation_batch(chosen)
  rows = []
  for heading, images, labels in (
    (f'training, step {step}', distorted, batch['label']),
    (config.eval_split, evaluated['image'], evaluated['label']),
  ):
    pixels = np.rint(np.asarray(images)[:SHEET_IMAGES]).astype(np.uint8)
    names = [dataset.label_names[label] for label in labels[:SHEET_IMAGES]]
    rows.append((heading, pixels, names))
  try:
    figures.contact_sheet(rows, path)
  except (OSError, ValueError) as error:
    raise UserError(f'--sheet={path}: {error}') from error


if __name__ == '__main__':
  sys.exit(cli.run(main))
