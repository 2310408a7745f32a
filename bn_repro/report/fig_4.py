"""Fig. 4: one crop, 144 crops, and the ensemble, from files of probabilities.

`bn_repro.evaluate` writes these files into a workdir. The ensemble is that of
the runs of a section whose configs are in `configs/ensemble/`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from pathlib import Path

from bn_repro import paper
from bn_repro.errors import UserError
from bn_repro.inference import averaging, probabilities
from bn_repro.inference.averaging import Scores
from bn_repro.report import claims
from bn_repro.report.runs import Group, Run, Section, Spread

# Folder of the files in a workdir. Their names are SPLIT-CROPS.npz.
FOLDER = 'probabilities'
# The paper's number of crops, beside one.
CROPS = 144


@dataclasses.dataclass(frozen=True)
class Result:
  """Scores of the networks of a section on the images of a split.

  Attributes:
    split: name of the split.
    crops: number of crops of each image.
    networks: scores of each run, by its name.
    members: names of the runs that are members of the ensemble.
    ensemble: scores of the ensemble; None with fewer than two members.
  """

  split: str
  crops: int
  networks: Mapping[str, Scores]
  members: Sequence[str]
  ensemble: Scores | None

  def of(self, group: Group) -> list[Scores]:
    """Scores of those runs of a group that have a file."""
    names = [run.name for run in group.runs]
    return [self.networks[name] for name in names if name in self.networks]


def read(section: Section) -> tuple[list[Result], list[str]]:
  """Reads and scores the files of a section.

  Returns:
    The results by split and number of crops, and a message for each file
    because of which the files of its name, in all runs, are left out.
  """
  found: dict[str, list[tuple[Run, Path]]] = {}
  for run in section.runs:
    for path in sorted((run.folder / run.name / FOLDER).glob('*.npz')):
      found.setdefault(path.name, []).append((run, path))
  results, problems = [], list[str]()
  for name, of_name in found.items():
    try:
      results.append(_result(*zip(*of_name, strict=True)))
    except UserError as error:
      problems += (f'Fig. 4 without {name}: {text}' for text in error.problems)
  return sorted(results, key=lambda one: (one.split, one.crops)), problems


def _result(runs: Sequence[Run], paths: Sequence[Path]) -> Result:
  """Scores the files of one split and number of crops.

  Args:
    runs: the run of each file.
    paths: the files.

  Raises:
    UserError: if a file cannot be read, or is not of the same images.
  """
  files = [probabilities.read(path) for path in paths]
  averaging.check_same_images(paths, files)
  names = [run.name for run in runs]
  scores = averaging.score(files, [[index] for index in range(len(files))])
  members = [i for i, run in enumerate(runs) if run.variant in paper.ENSEMBLE]
  ensemble = None
  if len(members) > 1:
    (ensemble,) = averaging.score(files, [members])
  return Result(
    split=files[0].facts['split'],
    crops=files[0].facts['crops'],
    networks=dict(zip(names, scores, strict=True)),
    members=[names[index] for index in members],
    ensemble=ensemble,
  )


def judge(section: Section, results: Sequence[Result]) -> list[claims.Row]:
  """Rows of the ledger: what many crops gain, and what the ensemble gains.

  The ensemble is that with most members, and of these that with most crops.
  """
  rows = []
  by_split: dict[str, list[Result]] = {}
  for result in results:
    by_split.setdefault(result.split, []).append(result)
  for split, of_split in by_split.items():
    title = f'{section.title}, {split}'
    by_crops = {result.crops: result for result in of_split}
    if {1, CROPS} <= by_crops.keys():
      rows += _gain_by_crops(section, title, by_crops[1], by_crops[CROPS])
    ensembles = [result for result in of_split if result.ensemble]
    if ensembles:
      largest = max(ensembles, key=lambda one: (len(one.members), one.crops))
      rows.append(_gain_by_ensemble(title, largest))
  return rows


def _gain_by_crops(
  section: Section, title: str, one: Result, many: Result
) -> list[claims.Row]:
  """The row for the networks that have files with one and with many crops.

  If a setting has several seeds, it is that of such settings alone.
  """
  settings = [
    [
      (one.networks[run.name], many.networks[run.name])
      for run in group.runs
      if run.name in one.networks and run.name in many.networks
    ]
    for group in section.groups
  ]
  pairs = [pair for setting in settings for pair in setting]
  if not pairs:
    return []
  compared = [setting for setting in settings if len(setting) > 1] or [pairs]
  return [
    _row(
      f'Fig. 4: {CROPS} crops of each image have a lower top-1 error than one.',
      (paper.FIG_4[1, 1], paper.FIG_4[CROPS, 1]),
      [[before for before, _ in setting] for setting in compared],
      [pair for setting in compared for pair in setting],
      title,
    )
  ]


def _gain_by_ensemble(title: str, result: Result) -> claims.Row:
  """The row for the ensemble, compared with its best member."""
  assert result.ensemble is not None
  members = [result.networks[name] for name in result.members]
  best = max(members, key=lambda member: member.top1)
  return _row(
    'Fig. 4: the ensemble has a lower top-1 error than its best member.',
    (paper.FIG_4[CROPS, 1], paper.FIG_4[CROPS, 6]),
    [members],
    [(best, result.ensemble)],
    f'{title}, {result.crops} crop{"s" if result.crops > 1 else ""}',
  )


def _row(
  claim: str,
  theirs: tuple[paper.Fig4Row, paper.Fig4Row],
  settings: Sequence[Sequence[Scores]],
  pairs: Sequence[tuple[Scores, Scores]],
  title: str,
) -> claims.Row:
  """A row of the ledger.

  A claim holds if all gains exceed the range of each setting, and fails if none
  is positive. Otherwise a gain may be a mere difference between networks.

  Args:
    claim: text of the claim.
    theirs: the paper's errors before and after.
    settings: scores before, of the networks of each setting.
    pairs: scores before and after, on the same images.
    title: what the images are.
  """
  gains = [after.top1 - before.top1 for before, after in pairs]
  correct = [[network.top1 for network in setting] for setting in settings]
  difference = max(max(setting) - min(setting) for setting in correct)
  count = sum(map(len, settings))
  if max(gains) <= 0:
    verdict = claims.FAILS
  elif count > 1 and min(gains) > difference:
    verdict = claims.HOLDS
  else:
    verdict = claims.UNDECIDED
  point = pairs[0][0].count / 100
  changes = Spread([-gain / point for gain in gains]).show(
    lambda change: f'{change:+.2f} points'
  )
  compared = (
    f'{count} networks, which differ by up to {difference / point:.2f} points'
    if count > 1
    else 'one network; how much others differ is not known'
  )
  before, after = (row.top1 for row in theirs)
  return claims.Row(
    claim,
    verdict,
    f'{changes}; {compared}',
    f'{after:g} % against {before:g} %: {after - before:+.1f} points',
    title,
    '',
  )
