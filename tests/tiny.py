"""`bn_repro.main` with a network of two modules, which compiles in seconds.

The rest of the program is the real one: run it as
`python tests/tiny.py --config=configs/bn_x5.py:mini --workdir=...`.
"""

from pathlib import Path
import sys

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bn_repro import main
from bn_repro.models import inception_table

_FULL_ROWS = inception_table.rows


def rows(reading, *, tiny=True):
  """A module of stride 1 and one of stride 2."""
  return _FULL_ROWS(reading, tiny=tiny or True)


if __name__ == '__main__':
  inception_table.rows = rows
  main.run_and_exit()
