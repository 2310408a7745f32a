"""Compares what the code computes with bn_repro/numerics.json.

  python scripts/numerics.py            names each value that differs
  python scripts/numerics.py --write    writes these values into the file

The file has results of the code, to six digits: losses and norms of small
networks, the order of examples, distorted and cropped images, learning rates.
Each run records the digest of the file, and the report names runs whose digest
is not that of the code. Write the file only after a change that is meant to
change results: published runs then have to be trained again. Values that do not
differ stay as they are, so the digest is the same whichever machine writes it.

Exit codes:
  0  no value differs, or the file was written
  1  a value differs
"""

import argparse
from collections.abc import Mapping, Sequence
import json
import math
import os
from pathlib import Path
import sys

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bn_repro import cli, numerics
from bn_repro.runtime.workdir import replace_file

# Of the values in the file, which rounds them by at most 5e-6.
DIGITS = 6
# Relative tolerance. Apart from that rounding, compilers that optimize more or
# less, for CPUs with SSE4.2 to AVX-512, differ by 1e-8. Measured by us.
RELATIVE = 1e-5
# Absolute tolerances of mean pixel values, in levels of 255, by the first part
# of a name. Of JPEG, decoders may round every pixel by a level; an error of a
# pixel in a crop makes a difference of 2. In affine copies an interpolated
# value that is a whole number may be truncated to the one below: 0.1 allows it
# for a tenth of the pixels.
ABSOLUTE = {'jpeg': 1.0, 'copies': 0.1}

# The programs run for milliseconds, so XLA optimizes as little as it can.
_XLA_FLAGS = (
  '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1'
)

Values = Mapping[str, Sequence[float]]


def differences(found: Values, stored: Values) -> dict[str, str]:
  """A line for each value that differs, or that only one side has, by name."""
  return {
    name: f'{name}: {_show(found, name)}, in the file {_show(stored, name)}'
    for name in {**stored, **found}
    if not _is_close(name, found.get(name, ()), stored.get(name, ()))
  }


def _is_close(
  name: str, found: Sequence[float], stored: Sequence[float]
) -> bool:
  absolute = ABSOLUTE.get(name.split('/')[0], 0.0)
  return len(found) == len(stored) and all(
    math.isclose(a, b, rel_tol=RELATIVE, abs_tol=absolute)
    for a, b in zip(found, stored, strict=True)
  )


def _show(values: Values, name: str) -> str:
  return _to_json(values[name]) if name in values else 'missing'


def _to_json(value: Sequence[float]) -> str:
  """A list of numbers, those that are not whole with `DIGITS` digits."""
  return json.dumps(
    [x if isinstance(x, int) else float(f'{x:.{DIGITS}g}') for x in value]
  )


def merge(found: Values, stored: Values) -> str:
  """The new content of the file: a line for each value found.

  Values that do not differ are as stored.
  """
  differing = differences(found, stored)
  lines = (
    f'  {json.dumps(name)}: '
    + _to_json(value if name in differing else stored[name])
    for name, value in found.items()
  )
  return '{\n' + ',\n'.join(lines) + '\n}\n'


def _compute() -> Values:
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = _XLA_FLAGS
  import jax
  import numerics_values

  jax.config.update('jax_enable_x64', True)  # noqa: FBT003
  return numerics_values.compute()


def main(argv: Sequence[str] | None = None) -> int:
  """Compares the values or writes them; returns the exit code."""
  parser = cli.Parser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--write', action='store_true', help='write the values that differ'
  )
  flags = parser.parse_args(argv)
  found, stored = _compute(), json.loads(numerics.FILE.read_text())
  differing = differences(found, stored)
  for line in differing.values():
    print(line)
  print(f'{len(differing)} of {len(found)} values differ from {numerics.FILE}')
  if flags.write and differing:
    replace_file(numerics.FILE, merge(found, stored))
    print(f'wrote them: the digest is {numerics.digest()} now')
  return 1 if differing and not flags.write else 0


if __name__ == '__main__':
  sys.exit(cli.run(main))
