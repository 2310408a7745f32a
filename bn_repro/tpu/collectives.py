"""Lists the collective operations of a step, as text that can be reviewed."""

from collections import Counter
from collections.abc import Iterator, Mapping
import math
import re
from typing import NamedTuple

_BYTES = {'f64': 8, 'f32': 4, 'bf16': 2, 'i64': 8, 'i32': 4, 'ui32': 4, 'i1': 1}
_OPERATION = re.compile(
  r'"stablehlo\.(all_reduce|all_gather|reduce_scatter|all_to_all'
  r'|collective_permute|collective_broadcast)"\(.*?\)'
  r' : \(([^)]*)\) -> ',
  re.DOTALL,
)


class Collective(NamedTuple):
  """A collective operation, identified by its name and its operands.

  Attributes:
    name: operation, such as all_reduce.
    arrays: shape and type of each operand, such as 64xf32.
  """

  name: str
  arrays: tuple[str, ...]

  def num_bytes(self) -> int:
    """Returns the size of the operands on one device, in bytes."""
    return sum(map(_array_bytes, self.arrays))


def _array_bytes(array: str) -> int:
  *shape, dtype = array.split('x')
  return math.prod(map(int, shape)) * _BYTES[dtype]


def count_lowered(text: str) -> Mapping[Collective, int]:
  """Counts the collectives of a lowered program, before XLA combines any.

  Args:
    text: StableHLO, from `jax.stages.Lowered.as_text`.
  """
  return Counter(
    Collective(name, tuple(re.findall(r'tensor<([^>]*)>', arrays)))
    for name, arrays in _OPERATION.findall(text)
  )


def count_compiled_all_reduces(text: str) -> int:
  """Counts the all-reduces of a compiled program.

  Args:
    text: HLO, from `jax.stages.Compiled.as_text`.
  """
  return len(re.findall(r' all-reduce(?:-start)?\(', text))


def total_bytes(counts: Mapping[Collective, int]) -> int:
  """Returns the size of all operands on one device, in bytes."""
  return sum(each.num_bytes() * count for each, count in counts.items())


def table(counts: Mapping[Collective, int]) -> Iterator[str]:
  """Yields a line for each collective, and a line of totals."""
  for each, count in sorted(counts.items()):
    yield f'{count:4} {each.name} {" ".join(each.arrays)}'
  yield f'{sum(counts.values()):4} in all, {total_bytes(counts):,} bytes'
