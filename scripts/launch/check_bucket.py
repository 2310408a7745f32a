"""Checks that this machine can write to a workdir in a bucket.

Example:
  python scripts/launch/check_bucket.py --workdir=gs://BUCKET/NAME

scripts/launch/prepare_host.sh runs it on every host, before training starts.
"""

import argparse
from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from bn_repro import cli, files
from bn_repro.runtime import buckets


def main() -> int:
  """Runs the command; returns its exit code."""
  parser = cli.Parser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--workdir', required=True, metavar='gs://BUCKET/NAME')
  workdir = parser.parse_args().workdir
  place = files.parse_place('--workdir', workdir)
  buckets.check_writable('--workdir', place)
  return 0


if __name__ == '__main__':
  sys.exit(cli.run(main))
