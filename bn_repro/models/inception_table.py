"""The Inception network of the paper as a table (appendix, Fig. 5).

Plain numbers, without JAX, so that a config can be checked before JAX is
imported.
"""

import dataclasses

# Five strides of two reduce 32 pixels to one. Our choice: a smaller image would
# be all padding in the last module.
MIN_IMAGE_SIZE = 32

# The stem: first convolution, then the 1x1 reduction and the 3x3 convolution.
STEM_CHANNELS = (64, 64, 192)
# The first convolution is separable: "depth multiplier 8" (appendix).
DEPTH_MULTIPLIER = 8

# One auxiliary head after 4d, with the sizes of googlenet.lua of
# soumith/imagenet-multiGPU.torch. With it the 576 reading has 13,594,824
# parameters: no other reading gives the paper's 13.6 million.
AUX_HEAD_AFTER = '4d'
AUX_CONV_CHANNELS = 128
AUX_HIDDEN = 768

# A module of stride 1 and one of stride 2.
TINY = ('3a', '3c')


@dataclasses.dataclass(frozen=True)
class Row:
  """One Inception module: the filters of its four branches, as printed.

  `conv_1x1` and `projection` are 0 in the two modules of stride 2, which have
  no 1x1 branch and whose pooling branch passes its input through. `pool` is avg
  or max.
  """

  name: str
  conv_1x1: int
  reduce_3x3: int
  conv_3x3: int
  reduce_double: int
  conv_double: int
  pool: str
  projection: int

  @property
  def stride(self) -> int:
    """Stride of the module; the output grid of 3c and 4e is halved."""
    return 2 if self.projection == 0 else 1

  def scaled(self, width: float) -> 'Row':
    """The module with its numbers of filters times `width`, rounded."""
    return dataclasses.replace(
      self,
      **{
        field.name: round(getattr(self, field.name) * width)
        for field in dataclasses.fields(self)
        if field.type is int
      },
    )


def rows(reading: str, *, tiny: bool = False) -> tuple[Row, ...]:
  """The ten modules under one reading of the printed table.

  Fig. 5 prints 128 filters for the projections of 4c and 4d and an output of
  576, which contradict each other.

  Args:
    reading: '608' takes the filters literally, '576' the output, with
      projections of 96 as in TF-Slim and the Torch port.
    tiny: only one module of each stride, for tests: they compile in seconds.
  """
  projection = {'576': 96, '608': 128}[reading]
  table = (
    Row('3a', 64, 64, 64, 64, 96, 'avg', 32),
    Row('3b', 64, 64, 96, 64, 96, 'avg', 64),
    Row('3c', 0, 128, 160, 64, 96, 'max', 0),
    Row('4a', 224, 64, 96, 96, 128, 'avg', 128),
    Row('4b', 192, 96, 128, 96, 128, 'avg', 128),
    Row('4c', 160, 128, 160, 128, 160, 'avg', projection),
    Row('4d', 96, 128, 192, 160, 192, 'avg', projection),
    Row('4e', 0, 128, 192, 192, 256, 'max', 0),
    Row('5a', 352, 192, 320, 160, 224, 'avg', 128),
    Row('5b', 352, 192, 320, 192, 224, 'max', 128),
  )
  return tuple(row for row in table if not tiny or row.name in TINY)


def width_bound() -> float:
  """The width multiplier above which every branch has at least one filter."""
  thinnest = min(
    filters
    for row in rows('576')
    for filters in dataclasses.astuple(row)
    if isinstance(filters, int) and filters > 0
  )
  # round() takes halves to the even number, so that exactly 0.5 becomes 0.
  return 0.5 / thinnest
