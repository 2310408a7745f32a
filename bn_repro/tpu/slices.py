"""Cloud TPU slices: what a chip can do, and which slices there are.

Figures are those of Google's pages on each version (Cloud TPU documentation,
"Key chip specifications", as of 2026), for one chip; the links of v4 are those
of its paper (Jouppi et al., 2023: six, of 50 GB/s each way).
"""

import dataclasses
import math

from bn_repro.errors import UserError

# Of the 2-D tori of v5e and v6e, and of the 3-D ones of v4 and v5p.
_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = (
  '2x2x1',
  '2x2x2',
  '2x2x4',
  '2x4x4',
  '4x4x4',
  '4x4x8',
  '4x8x8',
  '8x8x8',
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """A version of the TPU.

  Attributes:
    name: as in the documentation, such as v5e.
    memory: bytes of HBM.
    flops: a second, in bfloat16.
    memory_bandwidth: bytes a second, of HBM.
    link_bandwidth: bytes a second over all links to other chips, both ways.
    runtime_version: the image of a TPU VM on which JAX is installed.
    accelerator: what `gcloud` calls a slice of so many units.
    units: in `accelerator`, for each chip: chips, or cores of which it has two.
    topologies: of its slices.
  """

  name: str
  memory: float
  flops: float
  memory_bandwidth: float
  link_bandwidth: float
  runtime_version: str
  accelerator: str
  units: int
  topologies: tuple[str, ...]


_GB, _GIB = 1e9, 2.0**30
CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name='v4',
      memory=32 * _GIB,
      flops=275e12,
      memory_bandwidth=1_200 * _GB,
      link_bandwidth=600 * _GB,
      runtime_version='tpu-ubuntu2204-base',
      accelerator='v4-{}',
      units=2,
      topologies=_CUBES,
    ),
    Chip(
      name='v5e',
      memory=16 * _GB,
      flops=197e12,
      memory_bandwidth=819 * _GB,
      link_bandwidth=400 * _GB,
      runtime_version='v2-alpha-tpuv5-lite',
      accelerator='v5litepod-{}',
      units=1,
      topologies=_FLAT,
    ),
    Chip(
      name='v5p',
      memory=95 * _GIB,
      flops=459e12,
      memory_bandwidth=2_765 * _GB,
      link_bandwidth=1_200 * _GB,
      runtime_version='v2-alpha-tpuv5',
      accelerator='v5p-{}',
      units=2,
      topologies=_CUBES,
    ),
    Chip(
      name='v6e',
      memory=32 * _GB,
      flops=918e12,
      memory_bandwidth=1_638 * _GB,
      link_bandwidth=800 * _GB,
      runtime_version='v2-alpha-tpuv6e',
      accelerator='v6e-{}',
      units=1,
      topologies=_FLAT,
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice of a TPU.

  Attributes:
    chip: the version.
    topology: how its chips lie, such as 4x4.
  """

  chip: Chip
  topology: str

  def __str__(self) -> str:
    return f'{self.chip.name}:{self.topology}'

  @property
  def num_chips(self) -> int:
    """How many chips it has."""
    return math.prod(map(int, self.topology.split('x')))

  @property
  def num_hosts(self) -> int:
    """How many TPU VMs: one up to 8 chips of v5e and v6e, else 4 chips each."""
    if self.topology in ('1x1', '2x2', '2x4'):
      return 1
    return self.num_chips // 4

  @property
  def accelerator_type(self) -> str:
    """What `gcloud` calls it, such as v5litepod-16."""
    return self.chip.accelerator.format(self.num_chips * self.chip.units)


def parse_slice(name: str) -> Slice:
  """The slice that is called, for instance, v5e:4x4.

  Raises:
    UserError: if there is none of that name, with those that there are.
  """
  version, _, topology = name.partition(':')
  chip = CHIPS.get(version)
  if chip is None:
    raise UserError(
      f'--topology={name}: no such TPU. Give a version, of '
      f'{", ".join(CHIPS)}, and a topology, such as v5e:4x4.'
    )
  if topology not in chip.topologies:
    raise UserError(
      f'--topology={name}: no such slice of {version}. There are '
      f'{", ".join(f"{version}:{each}" for each in chip.topologies)}.'
    )
  return Slice(chip, topology)
