"""Where metrics go: `metrics.jsonl` always, a person's eyes, TensorBoard."""

from collections.abc import Mapping
import json
from typing import Any

from bn_repro.runtime import processes
from bn_repro.runtime.progress import ProgressDisplay
from bn_repro.runtime.workdir import MetricsLog, Workdir


class MetricWriter:
  """Writes each line of metrics to all who want it."""

  def __init__(
    self,
    workdir: Workdir,
    step: int,
    display: ProgressDisplay,
    *,
    tensorboard: bool,
  ):
    """Opens the logs of a run that goes on from `step`."""
    self._log = MetricsLog(workdir.metrics, step, writes=workdir.writes)
    # All processes have to evaluate the same; process 0 has written the lines.
    self._log.adopt(
      json.loads(processes.gather(json.dumps(self._log.known()))[0])
    )
    self._display = display
    self._tensorboard: Any = None
    if tensorboard and workdir.writes:
      from tensorboardX import SummaryWriter  # Seldom wanted; loads protobuf.

      self._tensorboard = SummaryWriter(
        str(workdir.path / 'tensorboard'), purge_step=step + 1
      )

  def has(self, step: int, split: str, statistics: str | None) -> bool:
    """Whether the line is there already."""
    return self._log.has(step, split, statistics)

  def write(self, line: Mapping[str, Any]) -> None:
    """Records a line, which must be new."""
    self._log.write(line)
    self._display.show(line)
    if self._tensorboard is not None:
      group = '_'.join(
        line[key] for key in ('split', 'statistics') if key in line
      )
      for name in ('loss', 'accuracy', 'top5_accuracy', 'learning_rate'):
        if name in line:
          self._tensorboard.add_scalar(
            f'{group}/{name}', line[name], line['step']
          )

  def sync(self) -> None:
    """Returns when everything is on the disk."""
    self._log.sync()
    if self._tensorboard is not None:
      self._tensorboard.flush()

  def close(self) -> None:
    """Closes all files."""
    self._log.close()
    if self._tensorboard is not None:
      self._tensorboard.close()
