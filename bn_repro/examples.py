"""Lists the training examples of a step, and shows what the network sees.

  python -m bn_repro.examples --config=configs/bn_x5.py --step=10000
  python -m bn_repro.examples --workdir=runs/bn_x5 --step=500 --sheet=500.png

The order is arithmetic on (seed, step, batch size): any step is listed at once,
whether a run has come to it or not. The sheet has the images of the step as
they reach the network, cropped, mirrored and distorted, and below them images
in the view of evaluation, with their labels in words. (An image that cannot be
decoded is listed; what is drawn, as what is trained on, is the next one.)
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from bn_repro import cli
from bn_repro import config as config_lib
from bn_repro.data import datasets
from bn_repro.data.split import Dataset, Split
from bn_repro.errors import UserError

# Images of each kind on a sheet, at most.
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
  parser.add_argument(
    '--workdir', metavar='DIR', help='of a run, in place of a config file'
  )
  parser.add_argument(
    '--step',
    type=int,
    default=0,
    help='updates applied before it; 0 is the first batch',
  )
  parser.add_argument(
    '--sheet', type=Path, metavar='PNG', help='also draw a contact sheet'
  )
  try:
    flags, overrides = cli.parse_arguments(
      sys.argv[1:] if argv is None else argv, parser
    )
    if bool(flags.config) == bool(flags.workdir):
      raise UserError('give --config or --workdir, one of them. Try --help.')
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
    for line in _list(config, dataset, flags.step):
      print(line)
    if flags.sheet:
      _draw(config, dataset, flags.step, flags.sheet)
      print(f'drawn: {flags.sheet}')
  except UserError as error:
    return cli.report_errors(error.problems)
  return 0


def _step_examples(
  config: ConfigDict, split: Split, step: int
) -> tuple[np.ndarray, np.ndarray]:
  """Positions in the stream of a step's examples, and which they are."""
  from bn_repro.data import input_pipeline  # Grain takes a second.

  positions = input_pipeline.positions(step, config.batch_size)
  order = input_pipeline.create_order(config, len(split))
  return positions, order.examples(positions)


def _list(config: ConfigDict, dataset: Dataset, step: int) -> list[str]:
  split = dataset.splits['train']
  positions, examples = _step_examples(config, split, step)
  rows = [('epoch', 'position', 'example', 'label', 'word', 'file')]
  for position, example in zip(positions, examples, strict=True):
    epoch, position = divmod(int(position), len(split))
    label = split.label_of(example)
    rows.append(
      (
        f'{epoch}',
        f'{position}',
        f'{example}',
        f'{label}',
        dataset.label_names[label],
        split.name_of(example),
      )
    )
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

  def distort(at: Any, batch: Any) -> Any:
    seed, number = at
    return steps.distorted_images(
      batch['image'], seed, number, config.data.distortion
    )

  # An image is distorted in the same way on any number of devices.
  mesh = parallel.create_mesh(parallel.first_device())
  distorted = parallel.data_parallel(distort, mesh, donate_state=False)(
    (np.uint32(config.seed), np.int32(step)), batch
  )
  chosen = np.linspace(
    0, len(shown) - 1, min(len(shown), SHEET_IMAGES), dtype=np.int64
  )
  evaluated = shown.evaluation_batch(chosen)

  def row(heading: str, images: Any, labels: Any) -> tuple[str, Any, list[str]]:
    images = np.asarray(images)[:SHEET_IMAGES]
    return (
      heading,
      np.rint(images).astype(np.uint8),
      [dataset.label_names[label] for label in labels[:SHEET_IMAGES]],
    )

  rows = [
    row(f'training, step {step}', distorted, batch['label']),
    row(config.eval_split, evaluated['image'], evaluated['label']),
  ]
  try:
    figures.contact_sheet(rows, path)
  except (OSError, ValueError) as error:
    raise UserError(f'--sheet={path}: {error}') from error


if __name__ == '__main__':
  sys.exit(main())
