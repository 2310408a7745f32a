"""What the study publishes, of runs written by hand."""

import json

import pytest
import study
from written_runs import add_percentiles, edit_facts, write_run

from bn_repro.report import claims
from bn_repro.report import runs as runs_lib
from bn_repro.runtime import workdir

BEFORE = [[[-1, -1], [0, 0], [1, 1]], [[0, 0], [2, 1], [3, 3]]]


@pytest.fixture
def out(tmp_path, monkeypatch):
  """The folder of a study whose part fig1 has one run."""
  monkeypatch.setattr(study, 'ROOT', tmp_path / 'root')
  folder = tmp_path / 'out' / 'fig1'
  write_run(folder / 'run', 'bn_mnist', [0.5, 0.9] * 6)
  add_percentiles(folder / 'run', BEFORE * 6)
  edit_facts(folder / 'run', command=f'main --workdir={folder}/run')
  path = folder / 'run' / 'metrics.jsonl'
  lines = path.read_bytes().splitlines(keepends=True)
  status = json.loads((folder / 'run' / 'status.json').read_text())
  status['metrics'] = workdir.MetricsDigest(lines).to_json()
  workdir.write_json(folder / 'run' / 'status.json', status)
  return folder


def published():
  return runs_lib.read_run(study.ROOT / 'results' / 'fig1' / 'run')


def test_published_runs_are_those_of_the_study(out):
  study.publish('fig1', out)
  before, after = runs_lib.read_run(out / 'run'), published()
  assert after.accuracies() == before.accuracies()
  assert after.config == before.config
  assert after.facts['command'] == 'main --workdir=run'
  # Evaluations 1, 5 and 9 of 12.
  assert after.percentiles(claims.FIG_1_PROBE).tolist() == [BEFORE[0]] * 3
  assert [line['step'] for line in after.probed()] == [10, 50, 90]
  assert sum('percentiles' in line for line in after.lines) == 3
  assert not list((study.ROOT / 'results').glob('.*'))


def test_published_runs_have_checksums(out):
  study.publish('fig1', out)
  folder = study.ROOT / 'results' / 'fig1' / 'run'
  for name, old, new in (
    ('metrics.jsonl', '0.9', '0.8'),
    ('run.json', 'workdir=run', 'workdir=other'),
  ):
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace(old, new, 1))
    with pytest.raises(runs_lib.UserError, match=name.replace('.', r'\.')):
      published()
    (folder / name).write_text(text)
  assert published().ended


def test_a_part_is_replaced_as_a_whole(out):
  study.publish('fig1', out)
  write_run(out / 'another', 'mnist', [0.5])
  (out / 'run').rename(out.parent / 'no_longer_a_trial')
  study.publish('fig1', out)
  folder = study.ROOT / 'results' / 'fig1'
  assert [path.name for path in folder.iterdir()] == ['another']
