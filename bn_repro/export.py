"""Writes a trained network in a form that other programs read.

  python -m bn_repro.export --model=runs/bn_x5 --format=safetensors --out=FILE
  python -m bn_repro.export --model=runs/bn_x5 --format=stablehlo --out=FILE

safetensors  The variables under their linen paths, and config, classes and
             preprocessing in the header. `bn_repro.load` reads it.
stablehlo    A program: uint8 images in, probabilities out, for any batch. It
             runs with JAX alone.
torch        The variables as a safetensors file with the names and layouts of
             Cadene's `bninception`.

A model card, FILE.md, is written beside it. MODEL is the workdir of a run, or a
model file.
"""

import argparse
from collections.abc import Sequence
import sys

from bn_repro import cli, files
from bn_repro.errors import UserError
from bn_repro.runtime import backend


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = cli.Parser(
    prog='python -m bn_repro.export',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  cli.add_model_argument(parser)
  parser.add_argument(
    '--format', required=True, choices=('safetensors', 'stablehlo', 'torch')
  )
  files.add_path_argument(
    parser, '--out', required=True, metavar='FILE', help='file to write'
  )
  parser.add_argument(
    '--fold',
    action='store_true',
    help='merge batch normalization into the convolutions; the card says how '
    'many digits this costs',
  )
  try:
    flags = parser.parse_args(argv)
    _export(flags)
  except UserError as error:
    return cli.report_user_error(error)
  return 0


def _export(flags: argparse.Namespace) -> None:
  """Writes the file and its card; an existing file is not overwritten."""
  card = flags.out.with_name(f'{flags.out.name}.md')
  for path in (flags.out, card):
    if path.exists():
      raise UserError(f'--out={flags.out}: {path} exists. Name another file.')
  if flags.fold and flags.format == 'torch':
    raise UserError(
      "--fold: Cadene's layout of PyTorch weights has batch normalization. "
      'Leave out --fold, or export another format.'
    )
  backend.import_jax()
  import safetensors.numpy

  from bn_repro.inference import cards, export, model, torch_export
  from bn_repro.training import model_file

  file = model_file.read(model.find(flags.model))
  cli.set_up_jax(file.config)
  notes: list[str] = []
  if flags.fold:
    error = export.folding_error(file)
    notes.append(
      'BN is folded into the convolutions, computed in float64. On random '
      f'images no logit changes by more than {error:.1e} of the largest one.'
    )
    file = export.fold(file)
  content: bytes
  if flags.format == 'torch':
    content = safetensors.numpy.save(torch_export.to_torch(file))
    notes.append(torch_export.card(file, flags.out.name))
  elif flags.format == 'stablehlo':
    content = export.to_stablehlo(file)
    height, width, channels = file.image_shape
    notes.append(
      cards.STABLEHLO.format(
        name=flags.out.name, height=height, width=width, channels=channels
      )
    )
  else:
    content = model_file.to_bytes(file)
    notes.append(f"To run it: `bn_repro.load('{flags.out.name}')`.")
  cli.write_output(flags.out, content)
  cli.write_output(card, cards.card(file, flags.out.name, notes))
  print(f'written: {flags.out} ({len(content):,} bytes) and {card}')


if __name__ == '__main__':
  sys.exit(cli.run(main))
