"""What a compiled step costs a device: memory, operations, bytes, messages.

Read from XLA's own figures and from the text of the compiled program, in which
each instruction names the layer that it comes from.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
import dataclasses
import math
import re
from typing import Any, NamedTuple

from bn_repro.tpu.slices import Chip

# What bytes are read and written for, in the order in which it is decided.
CONVOLUTION = 'convolutions'
POOLING = 'pooling'
COLLECTIVES = 'collectives'
OPTIMIZER = 'optimiser'
BN = 'BN'
DISTORTION = 'distortion'
OTHER = 'other'
KINDS = (
  CONVOLUTION,
  BN,
  POOLING,
  OPTIMIZER,
  DISTORTION,
  COLLECTIVES,
  OTHER,
)

# Of the least time.
PARTS = ('computing', 'memory', 'links')
# How many times the least time to expect. A chip rarely does better than a half
# of its roofline on a network of small convolutions, nor worse than a quarter;
# our guess, not measured.
SLOWER = (2, 4)

_ITEM_BYTES = {
  'pred': 1,
  's8': 1,
  'u8': 1,
  'bf16': 2,
  'f16': 2,
  's16': 2,
  'u16': 2,
  'f32': 4,
  's32': 4,
  'u32': 4,
  'f64': 8,
  's64': 8,
  'u64': 8,
}
# Instructions that move nothing.
_FREE = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'iota',
  'after-all',
  'partition-id',
}
# Those between memories, which go on while others compute.
_COPIES = {'copy-start', 'slice-start'}
_ARRAY = re.compile(
  r'\b(?P<item>[a-z]+\d*)\[(?P<shape>[\d,]*)\]'
  r'(?:\{(?P<order>[\d,]*)(?::T\((?P<tile>[\d,]+)\))?'
  r'(?:\([\d,]+\))*(?P<space>S\(\d\))?)?'
)
_INSTRUCTION = re.compile(
  r'^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<result>\(.*?\)|\S+)'
  r' (?P<opcode>[a-z][\w-]*)\((?P<operands>.*?)\)(?P<rest>[,\s].*)?$'
)
_SPACE = re.compile(r'S\(\d\)')
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$')
_CALLS = re.compile(r'\b(?:calls|to_apply|body)=%?([\w.-]+)')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Instruction(NamedTuple):
  """A line of a compiled program.

  Attributes:
    name: of its result.
    result: its type, such as bf16[32,8,8,8]{...}, or a tuple of such.
    opcode: such as fusion.
    operands: names of its arguments.
    calls: names of the computations it calls.
    op_name: path of the layer and the operation it comes from.
    target: of a custom call.
  """

  name: str
  result: str
  opcode: str
  operands: tuple[str, ...]
  calls: tuple[str, ...]
  op_name: str
  target: str


def computations(text: str) -> dict[str, list[Instruction]]:
  """The instructions of each computation of a compiled program.

  Args:
    text: HLO, from `jax.stages.Compiled.as_text`. The entry computation stands
      under the name ENTRY as well.
  """
  found: dict[str, list[Instruction]] = {}
  current: list[Instruction] = []
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = found[header['name']] = []
      if line.startswith('ENTRY'):
        found['ENTRY'] = current
    elif match := _INSTRUCTION.match(line):
      rest = match['rest'] or ''
      op_name, target = _OP_NAME.search(rest), _TARGET.search(rest)
      current.append(
        Instruction(
          match['name'],
          match['result'],
          match['opcode'],
          tuple(re.findall(r'%([\w.-]+)', match['operands'])),
          tuple(_CALLS.findall(rest)),
          op_name[1] if op_name else '',
          target[1] if target else '',
        )
      )
  return found


def array_bytes(result: str) -> int:
  """Bytes in main memory of an array, or of all arrays of a tuple.

  A TPU keeps arrays in tiles, such as T(8,128) over the two innermost of the
  axes, which `order` names from the innermost on; what pads them counts.
  Arrays in a memory of the chip itself, such as S(1), do not.
  """
  return sum(_array_bytes(match) for match in _ARRAY.finditer(result))


def _array_bytes(match: re.Match[str]) -> int:
  if match['space']:
    return 0
  shape, order, tile = (
    [int(number) for number in (match[name] or '').split(',') if number]
    for name in ('shape', 'order', 'tile')
  )
  for axis, length in zip(order, reversed(tile), strict=False):
    shape[axis] = -(-shape[axis] // length) * length
  return _ITEM_BYTES.get(match['item'], 0) * math.prod(shape)


def _values_bytes(result: str) -> int:
  """Bytes of the values alone, wherever they lie."""
  return sum(
    _ITEM_BYTES.get(match['item'], 0)
    * math.prod(int(n) for n in match['shape'].split(',') if n)
    for match in _ARRAY.finditer(result)
  )


def bytes_by_kind(text: str) -> Counter[str]:
  """Bytes of main memory that a program reads and writes, by what for.

  A fused instruction reads its arguments and writes its results once. Its kind
  is that of the most expensive thing in it: statistics of BN that are computed
  while a convolution writes its result cost no bytes, and count as none. What
  is fetched ahead into the chip belongs to the instruction that it is for.
  """
  program = computations(text)
  entry = {each.name: each for each in program['ENTRY']}
  users: dict[str, list[str]] = {}
  for each in entry.values():
    for operand in each.operands:
      users.setdefault(operand, []).append(each.name)
  contents = {name: list(_all_of(name, program)) for name in program}

  def kind(each: Instruction) -> str:
    inside = [each, *(i for called in each.calls for i in contents[called])]
    return _kind(
      {i.opcode for i in inside},
      {scope for i in inside for scope in i.op_name.split('/')},
    )

  def kind_of_user(name: str) -> str:
    for user in users.get(name, ()):
      if not _moves_nothing(entry[user]):
        return kind(entry[user])
      if (found := kind_of_user(user)) != OTHER:
        return found
    return OTHER

  found: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
  for each in entry.values():
    if each.opcode in _COPIES:
      found[kind_of_user(each.name)] += _copied_bytes(each)
    elif not _moves_nothing(each):
      found[kind(each)] += array_bytes(each.result) + sum(
        array_bytes(entry[operand].result)
        for operand in each.operands
        if operand in entry
      )
  return found


def _moves_nothing(each: Instruction) -> bool:
  return (
    each.opcode in _FREE
    or each.opcode in _COPIES
    or each.opcode.endswith('-done')
    or 'ConcatBitcast' in each.target
  )


def _copied_bytes(each: Instruction) -> int:
  """Of a copy to or from a memory of the chip: what passes main memory.

  Its result is a tuple of where to, where from, or the other way round.
  """
  sizes = [
    _array_bytes(match)
    for match in _ARRAY.finditer(_SPACE.sub('', each.result))
  ]
  in_main = [_array_bytes(match) for match in _ARRAY.finditer(each.result)]
  # A slice of a large array is as large as what it becomes.
  return min(size for size in sizes[:2]) * sum(map(bool, in_main[:2]))


def _all_of(
  name: str, program: Mapping[str, list[Instruction]]
) -> Iterator[Instruction]:
  """The instructions of a computation and of those it calls."""
  for each in program.get(name, ()):
    yield each
    for called in each.calls:
      yield from _all_of(called, program)


def _kind(opcodes: set[str], scopes: set[str]) -> str:
  """What an instruction is for, by what is fused into it."""
  if opcodes & {'convolution', 'dot'}:
    return CONVOLUTION
  if opcodes & {'reduce-window', 'select-and-scatter'}:
    return POOLING
  if any(opcode.startswith(('all-', 'collective-')) for opcode in opcodes):
    return COLLECTIVES
  if 'optimizer' in scopes:
    return OPTIMIZER
  if 'bn' in scopes:
    return BN
  if 'distortion' in scopes:
    return DISTORTION
  return OTHER


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a compiled step takes of one device.

  Attributes:
    memory: bytes, of arguments, results, temporary arrays at their peak, and
      the program.
    code: bytes of the program.
    flops: floating-point operations.
    bytes_accessed: read and written, as XLA counts them: wherever they lie.
    by_kind: bytes of main memory, by what they are for; empty before a
      compiler has decided it.
    num_collectives: all-reduces and other messages.
    collective_bytes: what the device puts into them.
  """

  memory: int
  code: int
  flops: float
  bytes_accessed: float
  by_kind: Mapping[str, int]
  num_collectives: int
  collective_bytes: int

  @property
  def main_memory(self) -> int:
    """Bytes of main memory that are read and written."""
    return sum(self.by_kind.values())


def of_compiled(compiled: Any) -> Cost:
  """The cost of a compiled step, from `jax.stages.Lowered.compile`."""
  text = compiled.as_text()
  analysis = compiled.cost_analysis()
  sizes = compiled.memory_analysis()
  messages = [
    each
    for each in computations(text)['ENTRY']
    if each.opcode.startswith(('all-', 'collective-', 'reduce-scatter'))
    and not each.opcode.endswith('-done')
  ]
  return Cost(
    memory=sizes.argument_size_in_bytes
    + sizes.output_size_in_bytes
    - sizes.alias_size_in_bytes
    + sizes.temp_size_in_bytes
    + sizes.generated_code_size_in_bytes,
    code=sizes.generated_code_size_in_bytes,
    flops=analysis['flops'],
    bytes_accessed=analysis['bytes accessed'],
    by_kind=dict(bytes_by_kind(text)),
    num_collectives=len(messages),
    collective_bytes=sum(_values_bytes(each.result) for each in messages),
  )


def least_seconds(cost: Cost, chip: Chip, num_chips: int) -> dict[str, float]:
  """The least time that each part of a step takes: its roofline.

  A chip computes and moves data at their peak rates; an all-reduce over a ring
  sends each byte twice, but for one part in `num_chips`, over half of the links
  (the other half receives).
  """
  share = 2 * (num_chips - 1) / num_chips
  return {
    'computing': cost.flops / chip.flops,
    'memory': cost.main_memory / chip.memory_bandwidth,
    'links': share * cost.collective_bytes / (chip.link_bandwidth / 2),
  }


def least_step_seconds(step: Cost, chip: Chip, num_chips: int) -> float:
  """Computing or moving data, whichever takes longer, and then messages."""
  parts = least_seconds(step, chip, num_chips)
  return max(parts['computing'], parts['memory']) + parts['links']
