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
    self._steps = range(first_step, first_step + num_steps)
    self._tracing = False

  def before_step(self, step: int) -> None:
    """Starts or stops the trace where the window begins or ends."""
    if step in self._steps and not self._tracing:
      jax.profiler.start_trace(self._directory)
      self._tracing = True
    elif step not in self._steps:
      self.close()

  def close(self) -> None:
    """Writes what was traced, if the window was begun."""
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
