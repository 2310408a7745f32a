"""Averages the class probabilities of several networks (section 4.2.3, Fig. 4).

python -m bn_repro.ensemble runs/ensemble/*/probabilities/test-1.npz

Reads files that `bn_repro.evaluate --save_probabilities` has written, of the
same images and with as many crops. Prints the accuracy of each network, of all
together, and the mean and range over all subsets of the networks by size. Of
more than ten networks, it scores only each one and all together.

The log-loss is the mean of -ln(probability of the label). The calibration error
is the expected one. The confidence in an image is its highest probability. In
each of 15 bins of confidence, of equal width, mean confidence and accuracy have
a distance; the error is its mean over the bins, weighted by their images.
"""

import argparse
from collections.abc import Mapping, Sequence
import csv
import io
import itertools
import os
from pathlib import Path
import statistics
import sys

from bn_repro import cli, files
from bn_repro.errors import UserError
from bn_repro.inference import averaging, probabilities
from bn_repro.inference.averaging import Scores
from bn_repro.inference.probabilities import Probabilities
from bn_repro.runtime import streams

# Most networks whose subsets are all scored, 1,023 of them. Our choice.
MAX_NETWORKS = 10

# Scores of each subset of networks, given by their indices; by size.
SubsetScores = Mapping[tuple[int, ...], Scores]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = cli.Parser(
    prog='python -m bn_repro.ensemble',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  files.add_path_argument(
    parser,
    'FILE',
    nargs='+',
    metavar='FILE.npz',
    help='probabilities of one network',
  )
  files.add_path_argument(
    parser,
    '--csv',
    metavar='FILE',
    help='file for the scores of all subsets',
  )
  files.add_path_argument(
    parser,
    '--plot',
    metavar='PNG',
    help='file for a figure of the accuracy over the number of networks',
  )
  try:
    flags = parser.parse_args(argv)
    _run(flags.FILE, flags.csv, flags.plot)
  except UserError as error:
    return cli.report_user_error(error)
  return 0


def _run(paths: Sequence[Path], table: Path | None, plot: Path | None) -> None:
  """Prints the scores, and writes the files that are not None."""
  if len(paths) < 2:
    raise UserError(f'{paths[0]}: one file. An ensemble needs two or more.')
  for flag, path in (('--csv', table), ('--plot', plot)):
    if path is not None:
      files.check_output(flag, path, paths)
  members = [probabilities.read(path) for path in paths]
  averaging.check_same_images(paths, members)
  subsets = _subsets(len(members))
  scores = dict(zip(subsets, averaging.score(members, subsets), strict=True))
  names = _names(paths)
  outputs: list[tuple[Path, str | bytes]] = []
  if table is not None:
    outputs.append((table, _csv(names, scores)))
  if plot is not None:
    outputs.append((plot, _plot(scores)))
  if outputs:
    streams.make_output_optional()
  for path, content in outputs:
    cli.write_output(path, content)
  print('\n'.join(_summary(members[0], names, scores)))
  for path, _ in outputs:
    print(f'wrote {path}')


def _subsets(count: int) -> list[tuple[int, ...]]:
  """The subsets to score, by size; the last one has all networks."""
  sizes = range(1, count + 1) if count <= MAX_NETWORKS else (1, count)
  return [
    subset
    for size in sizes
    for subset in itertools.combinations(range(count), size)
  ]


def _names(paths: Sequence[Path]) -> list[str]:
  """The paths without the beginning and the end that all of them share."""
  first = len(os.path.commonprefix([path.parts for path in paths]))
  last = len(os.path.commonprefix([path.parts[::-1] for path in paths]))
  return [
    str(Path(*path.parts[first : len(path.parts) - last])) for path in paths
  ]


def _by_size(scores: SubsetScores) -> dict[int, list[Scores]]:
  found: dict[int, list[Scores]] = {}
  for subset, one in scores.items():
    found.setdefault(len(subset), []).append(one)
  return found


def _summary(
  first: Probabilities, names: Sequence[str], scores: SubsetScores
) -> list[str]:
  """Returns the lines to print.

  Args:
    first: any of the files.
    names: name of each file.
    scores: of at least each network, and, last, of all together.
  """
  *_, everyone = scores.values()
  facts = first.facts
  crops = facts['crops']
  networks: list[tuple[str, ...]] = [
    ('network', 'top-1', 'top-5', 'log-loss', 'calibration error')
  ]
  for name, one in [
    *((name, scores[index,]) for index, name in enumerate(names)),
    (f'all {len(names)}', everyone),
  ]:
    networks.append(
      (
        name,
        _counted(one.accuracy, one.top1),
        _counted(one.top5_accuracy, one.top5),
        f'{one.log_loss:.4f}',
        f'{one.calibration_error:.4f}',
      )
    )
  sizes: list[tuple[str, ...]] = [('networks', 'subsets', 'top-1', 'top-5')]
  for size, of_size in _by_size(scores).items():
    sizes.append(
      (
        str(size),
        str(len(of_size)),
        _spread([one.accuracy for one in of_size]),
        _spread([one.top5_accuracy for one in of_size]),
      )
    )
  return [
    f'{everyone.count:,} {facts["split"]} images of {facts["data_name"]}, '
    f'{crops} crop{"s" if crops > 1 else ""} of each',
    '',
    *_aligned(networks),
    '',
    'Mean and range over the subsets of the networks, by size:',
    '',
    *_aligned(sizes),
  ]


def _counted(fraction: float, count: int) -> str:
  return f'{100 * fraction:.2f} % ({count:,})'


def _spread(fractions: Sequence[float]) -> str:
  mean = f'{100 * statistics.fmean(fractions):.2f} %'
  if len(fractions) == 1:
    return mean
  low, high = 100 * min(fractions), 100 * max(fractions)
  return f'{mean} ({low:.2f} to {high:.2f})'


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of a table, with columns that begin at the same place."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    '  '.join(
      text.ljust(width) for text, width in zip(row, widths, strict=True)
    ).rstrip()
    for row in rows
  ]


def _csv(names: Sequence[str], scores: SubsetScores) -> str:
  """A table of all subsets; the names of the networks are joined by spaces."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(
    (
      *('size', 'images', 'correct', 'correct_in_top5', 'log_loss'),
      *('calibration_error', 'networks'),
    )
  )
  for subset, one in scores.items():
    writer.writerow(
      (
        *(len(subset), one.count, one.top1, one.top5, one.log_loss),
        *(one.calibration_error, ' '.join(names[index] for index in subset)),
      )
    )
  return text.getvalue()


def _plot(scores: SubsetScores) -> bytes:
  """The figure, as PNG."""
  from bn_repro.report import figures  # Importing Matplotlib takes a second.

  by_size = _by_size(scores)
  return figures.ensemble(
    {
      'top-1 accuracy': {
        size: [one.accuracy for one in of_size]
        for size, of_size in by_size.items()
      },
      'top-5 accuracy': {
        size: [one.top5_accuracy for one in of_size]
        for size, of_size in by_size.items()
      },
    }
  )


if __name__ == '__main__':
  sys.exit(cli.run(main))
