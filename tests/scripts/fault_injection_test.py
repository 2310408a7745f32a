"""Faults at random: a short run of the script, and what it calls a failure."""

import random

import fault_injection
import pytest


@pytest.mark.slow
def test_nothing_is_lost(capsys):
  """The faults of one seed, so that the test can be repeated."""
  code = fault_injection.main(['--minutes=1', '--seed=3'])
  said = capsys.readouterr().out
  assert code == 0, said
  assert 'damage: ' in said


class Damages(fault_injection.Damages):
  """Trials on files that are not a run, read by a function of a test."""

  def __init__(self, folder, read):
    self._folder, self._done = folder, folder / 'done'
    (self._done / 'checkpoints').mkdir(parents=True)
    for name in ('metrics.jsonl', 'status.json', 'checkpoints/1'):
      (self._done / name).write_text(name * 9)
    self._roads = {'evaluate': read}
    self._expected = {'evaluate': read(self._done)[1]}
    self._without = (0, None, '')

  def outcomes(self):
    """What was done in each of many trials, and the outcome."""
    for number in range(60):
      try:
        yield self.trial(random.Random(number))
      except fault_injection.Failure as failure:
        yield str(failure), 'failure'


def read(path):
  return path.read_bytes() if path.exists() else None


def test_damage_that_is_believed_is_a_failure(tmp_path):
  trials = Damages(
    tmp_path, lambda workdir: (0, read(workdir / 'metrics.jsonl'), '')
  )
  outcomes = set()
  for done, outcome in trials.outcomes():
    outcomes.add(outcome)
    assert outcome == ('failure' if 'metrics.jsonl' in done else 'harmless')
  assert outcomes == {'failure', 'harmless'}
  assert read(tmp_path / 'done' / 'metrics.jsonl') == b'metrics.jsonl' * 9


@pytest.mark.parametrize(
  'code, errors, expected',
  [
    (1, 'error: damaged\n', 'reported'),
    (1, 'error: damaged\nerror: more\n', 'failure'),
    (1, 'Traceback (most recent call last):\n', 'failure'),
    (0, 'warning: damaged\n', 'failure'),
    (-6, 'error: damaged\n', 'failure'),
  ],
)
def test_damage_is_reported_in_one_line(code, errors, expected, tmp_path):
  intact = {}

  def refuse(workdir):
    found = [read(workdir / name) for name in ('status.json', 'checkpoints/1')]
    found.append(read(workdir / 'metrics.jsonl'))
    if intact.setdefault('files', found) == found:
      return 0, 'fine', ''
    return code, None, errors

  outcomes = {outcome for _, outcome in Damages(tmp_path, refuse).outcomes()}
  assert outcomes == {expected}


def test_every_kind_of_damage(tmp_path):
  (tmp_path / 'a').write_bytes(bytes(100))
  kinds = set()
  for number in range(50):
    (tmp_path / 'a').write_bytes(bytes(100))
    done = fault_injection.damage(tmp_path, random.Random(number))
    kinds.add(done.split()[0])
    left = read(tmp_path / 'a')
    if done.startswith('flip'):
      assert len(left) == 100 and sum(bin(x).count('1') for x in left) == 1
    else:
      assert left is None or left == bytes(len(left)) != bytes(100)
  assert kinds == {'flip', 'truncation', 'deletion'}
