"""Profiles a window of steps with XLA's profiler, for TensorBoard's XProf."""

from pathlib import Path

import jax


class Profile:
  """Traces the steps of a window once, into files of this process.

  The trace shows step numbers, and layer names on operations.
  """

  def __init__(self, directory: Path, first_step: int, num_steps: int):
    """Creates the profile of a window; one of 0 steps traces nothing."""
    self._directory = directory
    self._first_step = first_step
    self._end = first_step + num_steps
    self._tracing = False

  def before_call(self, step: int, num_steps: int) -> None:
    """Starts or stops the trace, to cover every call with a step in the window.

    Args:
      step: first step of the coming call.
      num_steps: number of steps of the coming call.
    """
    if max(step, self._first_step) >= min(step + num_steps, self._end):
      self.close()
    elif not self._tracing:
      jax.profiler.start_trace(self._directory)
      self._tracing = True

  def close(self) -> None:
    """Stops a running trace and writes it."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
