"""Compares runs with the paper: a page of figures and tables.

python -m bn_repro.report --runs=runs/quickstart --out=runs/report

Writes index.html, its figures, and ledger.md: the paper's claims, and whether
each one holds for these runs, by a bootstrap interval over seeds. Each folder
of workdirs becomes a section of the page, or several sections if its runs
differ in network or data set. Runs that differ only in their seeds share a row,
with the median (of two seeds the mean) and the range. Runs that are unfinished,
repeated, edited or of an unusual setting are left out; the page names them. A
section of runs with probabilities that `evaluate` has written into their
workdirs, WORKDIR/probabilities/SPLIT-CROPS.npz, has Fig. 4.

A warning names the runs that were made by other numerics than those of this
code: by code that computes other results, see bn_repro/numerics.py.
"""

import argparse
from collections.abc import Sequence
import sys

from bn_repro import cli, files
from bn_repro.errors import UserError
from bn_repro.report import page
from bn_repro.runtime import streams


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = cli.Parser(
    prog='python -m bn_repro.report',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  files.add_path_argument(
    parser,
    '--runs',
    action='append',
    required=True,
    in_bucket=True,
    help='workdir, or folder of workdirs, also in a bucket; may be repeated',
  )
  files.add_path_argument(
    parser,
    '--out',
    required=True,
    help='folder for the page',
  )
  try:
    flags = parser.parse_args(argv)
    streams.make_output_optional()
    problems = page.write_report(flags.runs, flags.out)
  except UserError as error:
    return cli.report_user_error(error)
  for problem in problems:
    print(f'warning: {problem}', file=sys.stderr)
  print(f'wrote {flags.out / "index.html"}')
  return 0


if __name__ == '__main__':
  sys.exit(cli.run(main))
