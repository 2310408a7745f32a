"""Classifies images with a trained network.

  python -m bn_repro.predict --model=runs/bn_x5 images/*.jpg
  python -m bn_repro.predict --model=runs/bn_x5 cat.png --top=3 --sheet=out.png

MODEL is the workdir of a run, or a model file. The network uses the parameters
and the population statistics of the last evaluation of its run, and needs no
training data. An image that cannot be decoded is named on standard error; the
others are classified, and the exit code is 1.
"""

import argparse
from collections.abc import Iterator, Sequence
import csv
import io
from pathlib import Path
import sys
from typing import TYPE_CHECKING, Any

from bn_repro import cli, files
from bn_repro.errors import UserError
from bn_repro.runtime import backend, streams
from bn_repro.runtime.progress import ImageProgress

if TYPE_CHECKING:
  from bn_repro.inference.model import Model, Prediction

# Largest number of images on a sheet.
SHEET_IMAGES = 48


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = cli.Parser(
    prog='python -m bn_repro.predict',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  cli.add_model_argument(parser)
  parser.add_argument(
    'images', nargs='+', type=_path, metavar='IMAGE', help='JPEG, PNG, ...'
  )
  parser.add_argument(
    '--top',
    type=cli.positive,
    default=5,
    metavar='N',
    help='number of classes to print for each image (default: 5)',
  )
  files.add_path_argument(
    parser,
    '--csv',
    metavar='FILE',
    help='file for a table of the N classes: file, rank, label, name, '
    'probability',
  )
  files.add_path_argument(
    parser,
    '--sheet',
    metavar='PNG',
    help=f'file for a picture of the first {SHEET_IMAGES} images',
  )
  try:
    return _predict(parser.parse_args(argv))
  except UserError as error:
    return cli.report_user_error(error)


def _path(text: str) -> Path:
  return files.expand('IMAGE', text)


def _predict(flags: argparse.Namespace) -> int:
  """Classifies the images of the command line; returns the exit code."""
  for flag, path in (('--csv', flags.csv), ('--sheet', flags.sheet)):
    if path is not None:
      files.check_output(flag, path, flags.images)
  backend.import_jax()
  from bn_repro.inference import model as model_lib
  from bn_repro.training import model_file

  if flags.csv or flags.sheet:
    streams.make_output_optional()
  file = model_file.read(model_lib.find(flags.model))
  cli.set_up_jax(file.config)
  model = model_lib.Model(file)
  print(_describe(model), flush=True)
  top = min(flags.top, len(model.label_names))
  width = max(len(str(image)) for image in flags.images)
  table = io.StringIO()
  rows = csv.writer(table, lineterminator='\n')
  rows.writerow(('file', 'rank', 'label', 'name', 'probability'))
  drawn: list[Any] = []
  failed = inverted = 0
  try:
    for prediction in _with_progress(model, flags.images):
      if prediction.error:
        failed += 1
        print(f'error: {prediction.name}: {prediction.error}', file=sys.stderr)
        continue
      inverted += _is_inverted(model, prediction)
      classes = _largest(model, prediction, top)
      columns = [f'{name} {value:.1%}' for _, name, value in classes]
      print('  '.join([f'{prediction.name:{width}}', *columns]))
      for rank, (label, name, value) in enumerate(classes, start=1):
        rows.writerow((prediction.name, rank, label, name, f'{value:.6g}'))
      if len(drawn) < SHEET_IMAGES:
        shown = [(name, value) for _, name, value in classes]
        drawn.append((Path(prediction.name).name, prediction.pixels, shown))
  finally:  # Also what was done before Ctrl-C.
    _write(flags, table.getvalue(), drawn)
  if inverted:
    print(
      f'warning: {inverted} of {len(flags.images)} images are mostly bright, '
      'and this network knows white digits on black alone. Invert them.',
      file=sys.stderr,
    )
  if failed:
    print(
      f'error: {failed} of {len(flags.images)} images not classified',
      file=sys.stderr,
    )
  return 1 if failed else 0


def _describe(model: 'Model') -> str:
  """Says what a model is, in a line."""
  facts = model.file.facts
  line = facts.get('evaluation')
  parts = [f'{len(model.label_names)} classes']
  if facts['statistics']:
    parts.append(f'{facts["statistics"]} statistics')
  if line:
    parts.append(
      f'step {line["step"]}, accuracy {line["accuracy"]:.4f} on '
      f'{line["num_examples"]} {line["split"]} images'
    )
  return f'model: {"; ".join(parts)}'


def _is_inverted(model: 'Model', prediction: 'Prediction') -> bool:
  """Whether an image is ink on paper, and the network one of MNIST's digits."""
  pixels = prediction.pixels
  assert pixels is not None
  of_digits = model.file.config.data.name in ('mnist', 'mnist_5k')
  return of_digits and bool((pixels > 127).mean() > 0.5)


def _largest(
  model: 'Model', prediction: 'Prediction', count: int
) -> list[tuple[int, str, float]]:
  """Returns the classes with the largest probabilities: label, name, value."""
  probabilities = prediction.probabilities
  assert probabilities is not None
  # Stable: of equal ones, the first class comes first.
  order = (-probabilities).argsort(kind='stable')[:count]
  return [
    (int(label), model.label_names[label], float(probabilities[label]))
    for label in order
  ]


def _with_progress(
  model: 'Model', images: Sequence[Path]
) -> Iterator['Prediction']:
  """Yields predictions, and shows after each batch how many images are left."""
  from bn_repro.inference.model import BATCH_SIZE

  shown = 0.0
  with ImageProgress('images', 0, len(images)) as display:
    for done, prediction in enumerate(model.predictions(images), start=1):
      yield prediction
      if done % BATCH_SIZE == 0 or done == len(images):
        display.show(done, model.waited - shown)
        shown = model.waited


def _write(flags: argparse.Namespace, table: str, drawn: list[Any]) -> None:
  """Writes the files that were asked for."""
  if not drawn:
    return  # No image could be classified.
  outputs: list[tuple[Path, str | bytes]] = []
  if flags.csv:
    outputs.append((flags.csv, table))
  if flags.sheet:
    from bn_repro.report import figures  # Importing Matplotlib takes a second.

    outputs.append((flags.sheet, figures.prediction_sheet(drawn)))
  for path, content in outputs:
    cli.write_output(path, content)
    print(f'wrote {path}')


if __name__ == '__main__':
  sys.exit(cli.run(main))
