"""A window of steps under XLA's profiler, for TensorBoard's XProf."""

from pathlib import Path

import jax


class Profile:
  """Traces the steps of a window, once, into files of this process.

  Steps carry their numbers, and operations the names of their layers.
  """

  def __init__(self, directory: Path, first_step: int, num_steps: int):
    """Traces nothing if there are no steps to trace."""
    self._directory = directory
    self._first_step = first_step
    self._end = first_step + num_steps
    self._tracing = False

  def before_call(self, step: int, num_steps: int) -> None:
    """Starts or stops the trace: of calls that have a step of the window.

    Args:
      step: the first of the call.
      num_steps: of the call.
    """
    if max(step, self._first_step) >= min(step + num_steps, self._end):
      self.close()
    elif not self._tracing:
      jax.profiler.start_trace(self._directory)
      self._tracing = True

  def close(self) -> None:
    """Writes what was traced, if the window was begun."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
