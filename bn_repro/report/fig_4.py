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
from bn_repro.report.ledger import Row
from bn_repro.report.runs import Run
from bn_repro.report.sections import Group, Section
from bn_repro.report.verdicts import Estimate, Scale, count_of, to_sentence

# Folder of the files in a workdir. Their names are SPLIT-CROPS.npz.
FOLDER = 'probabilities'
# The paper's number of crops, beside one.
CROPS = 144

_ERROR = Scale(
  lambda gain: f'{100 * gain:.2f}', 'points below', 'points above', ''
)


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

  @property
  def images(self) -> str:
    """The images, such as '500 test images'."""
    count = next(iter(self.networks.values())).count
    return f'{count:,} {self.split} images'

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


def judge(section: Section, results: Sequence[Result]) -> list[Row]:
  """Rows of the ledger: what many crops gain, and what the ensemble gains.

  The ensemble is that with most members, and of these that with most crops.
  """
  rows = []
  by_split: dict[str, list[Result]] = {}
  for result in results:
    by_split.setdefault(result.split, []).append(result)
  for of_split in by_split.values():
    by_crops = {result.crops: result for result in of_split}
    if {1, CROPS} <= by_crops.keys():
      rows += _gain_by_crops(section, by_crops[1], by_crops[CROPS])
    ensembles = [result for result in of_split if result.ensemble]
    if ensembles:
      largest = max(ensembles, key=lambda one: (len(one.members), one.crops))
      rows.append(_gain_by_ensemble(section, largest))
  return rows


def _gain_by_crops(section: Section, one: Result, many: Result) -> list[Row]:
  """The row for the networks that have files with one and with many crops."""
  pairs = [
    (scores, many.networks[name])
    for name, scores in one.networks.items()
    if name in many.networks
  ]
  if not pairs:
    return []
  return [
    _row(
      section,
      f'{CROPS} crops of each image have a lower top-1 error than one.',
      f'{CROPS} crops: {_difference((1, 1), (CROPS, 1))}.',
      f'{CROPS} crops: {{value}} one crop, on {one.images}',
      pairs,
      'network',
    )
  ]


def _gain_by_ensemble(section: Section, result: Result) -> Row:
  """The row for the ensemble, compared with its best member."""
  assert result.ensemble is not None
  members = [result.networks[name] for name in result.members]
  best = max(members, key=lambda member: member.accuracy)
  crops = f'{result.crops} crop{"s" if result.crops > 1 else ""}'
  return _row(
    section,
    'The ensemble has a lower top-1 error than its best member.',
    f'Ensemble of 6: {_difference((CROPS, 1), (CROPS, 6))}.',
    f'Ensemble of {len(members)}: {{value}} its best member, on '
    f'{result.images}, {crops}',
    [(best, result.ensemble)],
    'ensemble',
  )


def _difference(before: tuple[int, int], after: tuple[int, int]) -> str:
  """The paper's errors, by numbers of crops and of networks."""
  theirs, ours = paper.FIG_4[before].top1, paper.FIG_4[after].top1
  return f'{theirs - ours:.1f} points below ({ours:g} % against {theirs:g} %)'


def _row(
  section: Section,
  claim: str,
  theirs: str,
  sentence: str,
  pairs: Sequence[tuple[Scores, Scores]],
  what: str,
) -> Row:
  """A row of the ledger, whose values are decreases of the top-1 error.

  Args:
    section: the networks.
    claim: text of the claim.
    theirs: the paper's figure, as a sentence.
    sentence: template of ours.
    pairs: scores before and after, for each network.
    what: what there is a pair of.
  """
  gains = Estimate(
    [after.accuracy - before.accuracy for before, after in pairs]
  )
  return Row(
    'Fig. 4',
    claim,
    theirs,
    section.data_label,
    section.name,
    gains.verdict(0),
    to_sentence(gains, _ERROR, sentence),
    count_of(len(pairs), what),
  )
