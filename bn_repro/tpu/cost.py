"""Computes what a compiled step costs one device.

Memory, operations and bytes are read from XLA's own analysis and from the text
of the compiled program, in which each instruction names the layer it comes
from.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
import dataclasses
import math
import re
from typing import Any, NamedTuple

from bn_repro.tpu.slices import Chip

# Kinds of instructions by which the traffic of HBM is divided.
CONVOLUTION = 'convolutions'
BN = 'BN'
POOLING = 'pooling'
OPTIMIZER = 'optimizer'
DISTORTION = 'distortion'
COLLECTIVES = 'collectives'
OTHER = 'other'
KINDS = (CONVOLUTION, BN, POOLING, OPTIMIZER, DISTORTION, COLLECTIVES, OTHER)

# Expected time of a step, in multiples of its lower bound. Our choice, not
# measured: a network of small convolutions rarely exceeds a half of the
# roofline of a chip or falls below a quarter.
EXPECTED_FACTORS = (2, 4)

_ITEM_BYTES = {'pred': 1, 'bf16': 2} | {
  f'{kind}{bits}': bits // 8 for kind in 'suf' for bits in (8, 16, 32, 64)
}
# Instructions that move no data.
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
# Asynchronous copies between HBM and on-chip memory.
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
  """An instruction of a compiled program.

  Attributes:
    name: name of the result.
    result: type of the result, such as bf16[32,8,8,8]{...}, or of a tuple.
    opcode: operation, such as fusion.
    operands: names of the operands.
    calls: names of the computations that it calls.
    op_name: path of the layer and the operation that it comes from.
    target: target of a custom call.
  """

  name: str
  result: str
  opcode: str
  operands: tuple[str, ...]
  calls: tuple[str, ...]
  op_name: str
  target: str

  @property
  def moves_nothing(self) -> bool:
    """Whether the instruction itself neither reads nor writes memory."""
    return (
      self.opcode in _FREE | _COPIES
      or self.opcode.endswith('-done')
      or 'ConcatBitcast' in self.target
    )


def computations(text: str) -> dict[str, list[Instruction]]:
  """Returns the instructions of each computation of a compiled program.

  Args:
    text: HLO, from `jax.stages.Compiled.as_text`. The entry computation is also
      returned under the name ENTRY.
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
  """Returns the bytes of HBM that an array, or a tuple of arrays, takes.

  A TPU stores arrays in tiles, such as T(8,128) over the two innermost axes;
  the padding of tiles counts. Arrays in on-chip memory, such as S(1), take no
  HBM.
  """
  return sum(_array_bytes(match) for match in _ARRAY.finditer(result))


def _array_bytes(match: re.Match[str]) -> int:
  if match['space']:
    return 0
  # `order` lists the axes from the innermost to the outermost.
  shape, order, tile = (
    [int(number) for number in (match[name] or '').split(',') if number]
    for name in ('shape', 'order', 'tile')
  )
  for axis, length in zip(order, reversed(tile), strict=False):
    shape[axis] = -(-shape[axis] // length) * length
  return _ITEM_BYTES.get(match['item'], 0) * math.prod(shape)


def _value_bytes(result: str) -> int:
  """Returns the bytes of the values, without padding, in any memory."""
  return sum(
    _ITEM_BYTES.get(match['item'], 0)
    * math.prod(int(n) for n in match['shape'].split(',') if n)
    for match in _ARRAY.finditer(result)
  )


def bytes_by_kind(text: str) -> Counter[str]:
  """Returns the bytes of HBM that a program reads and writes, by kind.

  A fused instruction reads its operands and writes its results once, and has
  the kind of the most expensive operation in it: BN statistics that a
  convolution computes while it writes its result cost nothing. A copy into
  on-chip memory has the kind of the instruction that uses it.

  Args:
    text: HLO, from `jax.stages.Compiled.as_text`.
  """
  program = computations(text)
  entry = {each.name: each for each in program['ENTRY']}
  users: dict[str, list[str]] = {}
  for each in entry.values():
    for operand in each.operands:
      users.setdefault(operand, []).append(each.name)

  def kind(each: Instruction) -> str:
    inside = [each, *_called(each, program)]
    return _kind(
      {i.opcode for i in inside},
      {scope for i in inside for scope in i.op_name.split('/')},
    )

  def kind_of_user(name: str) -> str:
    for user in users.get(name, ()):
      if not entry[user].moves_nothing:
        return kind(entry[user])
      if (found := kind_of_user(user)) != OTHER:
        return found
    return OTHER

  found: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
  for each in entry.values():
    if each.opcode in _COPIES:
      found[kind_of_user(each.name)] += _copied_bytes(each)
    elif not each.moves_nothing:
      found[kind(each)] += array_bytes(each.result) + sum(
        array_bytes(entry[operand].result)
        for operand in each.operands
        if operand in entry
      )
  return found


def _copied_bytes(each: Instruction) -> int:
  """Returns the bytes of HBM that a copy to or from on-chip memory moves."""
  # The result is a tuple of destination and source, or of source and
  # destination.
  sizes = [
    _array_bytes(match)
    for match in _ARRAY.finditer(_SPACE.sub('', each.result))
  ]
  in_hbm = [_array_bytes(match) for match in _ARRAY.finditer(each.result)]
  # A slice moves as much as its smaller side holds.
  return min(sizes[:2]) * sum(map(bool, in_hbm[:2]))


def _called(
  each: Instruction, program: Mapping[str, list[Instruction]]
) -> Iterator[Instruction]:
  """Yields the instructions of all computations that an instruction calls."""
  for name in each.calls:
    for inner in program.get(name, ()):
      yield inner
      yield from _called(inner, program)


def _kind(opcodes: set[str], scopes: set[str]) -> str:
  """Returns the kind of an instruction, from what is fused into it."""
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
  """Cost of a compiled step on one device.

  Attributes:
    memory: bytes of arguments, results, temporary arrays at their peak, and
      code.
    code: bytes of the compiled code.
    flops: floating-point operations.
    bytes_accessed: bytes read and written in any memory, as XLA counts them.
    by_kind: bytes read and written in HBM, by kind of instruction; empty for a
      program that is not compiled.
    num_collectives: number of collectives.
    collective_bytes: bytes that the device contributes to them.
  """

  memory: int
  code: int
  flops: float
  bytes_accessed: float
  by_kind: Mapping[str, int]
  num_collectives: int
  collective_bytes: int

  @property
  def hbm_bytes(self) -> int:
    """Bytes read and written in HBM."""
    return sum(self.by_kind.values())


def from_compiled(compiled: Any) -> Cost:
  """Returns the cost of a step.

  Args:
    compiled: the step, a `jax.stages.Compiled`.
  """
  text = compiled.as_text()
  analysis = compiled.cost_analysis()
  sizes = compiled.memory_analysis()
  collectives = [
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
    num_collectives=len(collectives),
    collective_bytes=sum(_value_bytes(each.result) for each in collectives),
  )


def lower_bounds(cost: Cost, chip: Chip, num_chips: int) -> dict[str, float]:
  """Returns a lower bound on the time of each resource, in seconds (roofline).

  The chip computes and moves data at its peak rates. An all-reduce over a ring
  sends each byte 2 (n - 1) / n times, over half of the interconnect's
  bandwidth: the other half receives.
  """
  sent = 2 * (num_chips - 1) / num_chips * cost.collective_bytes
  return {
    'compute': cost.flops / chip.flops,
    'HBM': cost.hbm_bytes / chip.memory_bandwidth,
    'interconnect': sent / (chip.interconnect_bandwidth / 2),
  }


def min_step_seconds(cost: Cost, chip: Chip, num_chips: int) -> float:
  """Returns a lower bound on the time of a step, in seconds.

  Compute and HBM overlap; collectives overlap with neither.
  """
  bounds = lower_bounds(cost, chip, num_chips)
  return max(bounds['compute'], bounds['HBM']) + bounds['interconnect']
