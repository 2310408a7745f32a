"""Cloud TPU slices: the topologies on offer and the peak rates of a chip.

All figures are for one chip, from Google's Cloud TPU documentation ("Key chip
specifications", 2026). The interconnect of v4 is from its paper (Jouppi et al.,
2023: six links of 50 GB/s in each direction).
"""

import dataclasses
import math

from bn_repro.errors import UserError

# 2-D tori of v5e and v6e, and 3-D tori of v4 and v5p.
_TOPOLOGIES_2D = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_TOPOLOGIES_3D = (
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
    name: version, as in the documentation, such as v5e.
    memory: HBM in bytes.
    flops: peak rate in bfloat16, in floating-point operations a second.
    memory_bandwidth: peak rate of HBM, in bytes a second.
    interconnect_bandwidth: bytes a second over all links to other chips, both
      directions added.
    runtime_version: image of a TPU VM on which JAX is installed.
    accelerator_format: format of gcloud's accelerator type, filled in with the
      number of units.
    units_per_chip: units that gcloud counts for a chip: 1, or 2 where it counts
      cores.
    topologies: topologies of its slices.
  """

  name: str
  memory: float
  flops: float
  memory_bandwidth: float
  interconnect_bandwidth: float
  runtime_version: str
  accelerator_format: str
  units_per_chip: int
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
      interconnect_bandwidth=600 * _GB,
      runtime_version='tpu-ubuntu2204-base',
      accelerator_format='v4-{}',
      units_per_chip=2,
      topologies=_TOPOLOGIES_3D,
    ),
    Chip(
      name='v5e',
      memory=16 * _GB,
      flops=197e12,
      memory_bandwidth=819 * _GB,
      interconnect_bandwidth=400 * _GB,
      runtime_version='v2-alpha-tpuv5-lite',
      accelerator_format='v5litepod-{}',
      units_per_chip=1,
      topologies=_TOPOLOGIES_2D,
    ),
    Chip(
      name='v5p',
      memory=95 * _GIB,
      flops=459e12,
      memory_bandwidth=2_765 * _GB,
      interconnect_bandwidth=1_200 * _GB,
      runtime_version='v2-alpha-tpuv5',
      accelerator_format='v5p-{}',
      units_per_chip=2,
      topologies=_TOPOLOGIES_3D,
    ),
    Chip(
      name='v6e',
      memory=32 * _GB,
      flops=918e12,
      memory_bandwidth=1_638 * _GB,
      interconnect_bandwidth=800 * _GB,
      runtime_version='v2-alpha-tpuv6e',
      accelerator_format='v6e-{}',
      units_per_chip=1,
      topologies=_TOPOLOGIES_2D,
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice of a TPU.

  Attributes:
    chip: version of the TPU.
    topology: number of chips along each axis, such as 4x4.
  """

  chip: Chip
  topology: str

  def __str__(self) -> str:
    return f'{self.chip.name}:{self.topology}'

  @property
  def num_chips(self) -> int:
    """Number of chips."""
    return math.prod(map(int, self.topology.split('x')))

  @property
  def num_hosts(self) -> int:
    """Number of TPU VMs: one up to 8 chips of v5e or v6e, else one per 4."""
    if self.topology in ('1x1', '2x2', '2x4'):
      return 1
    return self.num_chips // 4

  @property
  def accelerator_type(self) -> str:
    """Name that gcloud takes, such as v5litepod-16."""
    units = self.num_chips * self.chip.units_per_chip
    return self.chip.accelerator_format.format(units)


def parse_slice(name: str) -> Slice:
  """Returns the slice of a name such as v5e:4x4.

  Raises:
    UserError: if no slice has this name; the message lists the valid names.
  """
  version, _, topology = name.partition(':')
  chip = CHIPS.get(version)
  if chip is None:
    raise UserError(
      f'--topology={name}: no such TPU. Use one of {", ".join(CHIPS)} with a '
      'topology, such as v5e:4x4.'
    )
  if topology not in chip.topologies:
    raise UserError(
      f'--topology={name}: {version} has no such slice. Use one of '
      f'{", ".join(f"{version}:{each}" for each in chip.topologies)}.'
    )
  return Slice(chip, topology)
