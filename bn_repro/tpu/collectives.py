"""What the devices send one another in a step, as text that can be reviewed."""

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
  """A kind of collective; one operation of it takes one or more arrays.

  Attributes:
    name: of the operation.
    arrays: shape and type of each, such as 64xf32.
  """

  name: str
  arrays: tuple[str, ...]

  def num_bytes(self) -> int:
    """What a device puts in."""
    return sum(map(_size, self.arrays))


def _size(array: str) -> int:
  *shape, dtype = array.split('x')
  return math.prod(map(int, shape)) * _BYTES[dtype]


def of_lowered(text: str) -> Mapping[Collective, int]:
  """Counts the collectives of a lowered program, before XLA merges any.

  Args:
    text: StableHLO, from `jax.stages.Lowered.as_text`.
  """
  return Counter(
    Collective(name, tuple(re.findall(r'tensor<([^>]*)>', arrays)))
    for name, arrays in _OPERATION.findall(text)
  )


def of_compiled(text: str) -> int:
  """Counts the all-reduces of a compiled program.

  Args:
    text: HLO, from `jax.stages.Compiled.as_text`.
  """
  return len(re.findall(r' all-reduce(?:-start)?\(', text))


def total_bytes(found: Mapping[Collective, int]) -> int:
  """What a device puts into all of them."""
  return sum(each.num_bytes() * count for each, count in found.items())


def table(found: Mapping[Collective, int]) -> Iterator[str]:
  """A line for each kind, and one for all."""
  for each, count in sorted(found.items()):
    yield f'{count:4} {each.name} {" ".join(each.arrays)}'
  yield f'{sum(found.values()):4} in all, {total_bytes(found):,} bytes'
