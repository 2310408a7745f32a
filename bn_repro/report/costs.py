"""What a run costs up to an accuracy."""

import dataclasses

from bn_repro import paper
from bn_repro.report.runs import Run


@dataclasses.dataclass(frozen=True)
class Cost:
  """The cost of training up to an accuracy.

  Attributes:
    steps: steps of 32 images.
    images: number of images.
    flops: floating-point operations; None if not recorded.
    cpu_minutes: CPU-minutes of training; None if not recorded.
  """

  steps: float
  images: float
  flops: float | None
  cpu_minutes: float | None


def to_target(run: Run, target: float) -> Cost | None:
  """The cost up to the first evaluation with accuracy `target`, or None."""
  steps = run.steps_to(target)
  if steps is None:
    return None
  return Cost(steps, steps * paper.BATCH_SIZE, None, None)
