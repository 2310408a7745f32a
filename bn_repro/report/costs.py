"""What it costs a run to reach an accuracy."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from bn_repro import paper
from bn_repro.report.runs import Run

# A multiply-add is two operations. The backward pass takes twice those of the
# forward pass: one product for the gradient of a layer's inputs, and one for
# that of its weights.
_FLOPS_PER_MULTIPLY_ADD = 3 * 2


@dataclasses.dataclass(frozen=True)
class Cost:
  """The training up to an evaluation.

  Attributes:
    steps: steps of 32 images, the paper's unit.
    images: images trained on, each time that one is seen.
    flops: floating-point operations of convolutions and dense layers, forward
      and backward. BN, pooling, nonlinearities and the optimizer are left out,
      and so are evaluations. None if `run.json` has no `multiply_adds`.
    cpu_minutes: CPU time of training on all cores, without compilation,
      evaluations and checkpoints. None if no line of training metrics up to
      there records it.
  """

  steps: float
  images: int
  flops: float | None
  cpu_minutes: float | None


def to_target(run: Run, target: float) -> Cost | None:
  """The cost up to the first evaluation with accuracy `target`.

  None if no evaluation reaches it.
  """
  steps = run.steps_to(target)
  if steps is None:
    return None
  images = round(steps * paper.BATCH_SIZE)
  multiply_adds = run.facts.get('multiply_adds')
  timings = [
    line['timing']
    for line in run.lines
    if line['split'] == 'train'
    and line['step'] * run.equivalent <= steps
    and 'cpu_seconds' in line.get('timing', {})
  ]
  return Cost(
    steps=steps,
    images=images,
    flops=multiply_adds and _FLOPS_PER_MULTIPLY_ADD * multiply_adds * images,
    cpu_minutes=_cpu_minutes(timings, images),
  )


def _cpu_minutes(timings: list[Mapping[str, Any]], images: int) -> float | None:
  """CPU-minutes of some images, at the mean rate of lines of metrics.

  The lines need not cover all of these images: a run may have been resumed
  between two lines.
  """
  if not timings:
    return None
  seconds = sum(timing['cpu_seconds'] for timing in timings)
  timed = sum(
    timing['images_per_second'] * timing['seconds'] for timing in timings
  )
  return seconds / timed * images / 60
