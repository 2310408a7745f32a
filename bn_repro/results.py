"""What runs have written, read back and put in order. Imports no JAX."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
from pathlib import Path
import statistics
from typing import Any

from bn_repro import workdir as workdir_lib
from bn_repro.config import UserError

# The paper's axis: steps of 32 images.
PAPER_BATCH_SIZE = 32

# Forms of BN statistics in the order in which a run's results are quoted.
PREFERRED = ('population', None, 'moving')

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Run:
  """One run.

  Attributes:
    name: its directory.
    variant: the config it was started from, such as 'bn_x5'.
    config: the resolved config.
    facts: `run.json`.
    status: `status.json`.
    lines: `metrics.jsonl`.
  """

  name: str
  variant: str
  config: Mapping[str, Any]
  facts: Mapping[str, Any]
  status: Mapping[str, Any]
  lines: Sequence[Mapping[str, Any]]

  @property
  def step(self) -> int:
    """The last step that is known of."""
    steps = [line['step'] for line in self.lines]
    return max([self.status.get('step', 0), *steps])

  @property
  def data_name(self) -> str:
    """The data set it was trained on."""
    return self.config['data']['name']

  def curve(self, split: str, metric: str, form: str | None) -> list[Point]:
    """`metric` over equivalent steps (images seen / 32)."""
    scale = self.config['batch_size'] / PAPER_BATCH_SIZE
    return [
      (line['step'] * scale, line[metric])
      for line in self.lines
      if line['split'] == split and line.get('statistics') == form
    ]

  def quoted_curve(self, split: str | None = None) -> list[Point]:
    """Accuracy on a split, `eval_split` by default, in the form to quote."""
    split = split or self.config['eval_split']
    curves = (self.curve(split, 'accuracy', form) for form in PREFERRED)
    return next((curve for curve in curves if curve), [])

  def best(self) -> float | None:
    """The best accuracy of the quoted curve."""
    return max((accuracy for _, accuracy in self.quoted_curve()), default=None)

  def test_accuracy(self) -> float | None:
    """Accuracy on the test images, which are evaluated after the last step."""
    curve = self.quoted_curve('test')
    return curve[-1][1] if curve else None

  def steps_to(self, target: float) -> float | None:
    """The first evaluated step whose accuracy is at least the target."""
    return next(
      (step for step, accuracy in self.quoted_curve() if accuracy >= target),
      None,
    )


def read_runs(folders: Iterable[str]) -> tuple[list[Run], list[str]]:
  """Reads every run in some folders, or folders of folders.

  Returns:
    The runs, and a line for each one that could not be read.

  Raises:
    UserError: if there is no run at all.
  """
  runs, problems = [], []
  seen: set[Path] = set()
  for folder in folders:
    workdirs = [
      path.parent
      for pattern in ('config.json', '*/config.json', '*/*/config.json')
      for path in sorted(Path(folder).glob(pattern))
    ]
    if not workdirs:
      problems.append(f'--runs={folder}: no run there (no config.json).')
    for workdir in workdirs:
      if workdir.resolve() in seen:
        continue
      seen.add(workdir.resolve())
      try:
        runs.append(_read_run(workdir))
      except (UserError, KeyError, TypeError) as error:
        problems.append(f'{workdir}: cannot be read ({error}).')
  if not runs:
    raise UserError(*problems)
  return runs, problems


def _read_run(workdir: Path) -> Run:
  facts = workdir_lib.read_json(workdir / 'run.json') or {}
  config_file = facts.get('config_file', workdir.name)
  run = Run(
    name=workdir.name,
    variant=Path(config_file.partition(':')[0]).stem,
    config=workdir_lib.read_json(workdir / 'config.json'),
    facts=facts,
    status=workdir_lib.read_json(workdir / 'status.json') or {},
    lines=workdir_lib.read_metrics(workdir / 'metrics.jsonl'),
  )
  # Read once here, so that a run that lacks something is named, not half shown.
  _ = run.data_name, run.config['model']['width']
  _ = run.quoted_curve(), run.curve('train', 'loss', None), run.test_accuracy()
  return run


@dataclasses.dataclass(frozen=True)
class Group:
  """The runs of one variant on one data set, which differ in their seeds."""

  variant: str
  runs: Sequence[Run]

  @property
  def ended(self) -> bool:
    """Whether all of them have come to their end, be it by diverging."""
    statuses = {run.status.get('status') for run in self.runs}
    return statuses <= {workdir_lib.DONE, workdir_lib.DIVERGED}

  def median_best(self) -> float | None:
    """Median over runs of the best accuracy, one that a run has reached."""
    best = [value for run in self.runs if (value := run.best()) is not None]
    return statistics.median_low(best) if best else None

  def median_steps_to(self, target: float | None) -> float | None:
    """Median of the steps to a target; None if half of the runs miss it."""
    if target is None:
      return None
    reached = [run.steps_to(target) for run in self.runs]
    steps = [math.inf if step is None else step for step in reached]
    middle = statistics.median_low(steps)
    return middle if math.isfinite(middle) else None


def group_runs(runs: Iterable[Run], order: Sequence[str]) -> list[Group]:
  """Groups runs by variant, in the given order, unknown variants last."""
  by_variant: dict[str, list[Run]] = {}
  for run in runs:
    by_variant.setdefault(run.variant, []).append(run)
  known = [variant for variant in order if variant in by_variant]
  unknown = sorted(by_variant.keys() - set(order))
  return [Group(variant, by_variant[variant]) for variant in known + unknown]


def median(values: Iterable[float | None]) -> float | None:
  """The median of the values that are there; None if none is."""
  present = [value for value in values if value is not None]
  return statistics.median(present) if present else None
