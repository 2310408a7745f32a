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
  # Evaluations 1 and 9 of 12; none with moving averages.
  assert after.percentiles(claims.FIG_1_PROBE).tolist() == [BEFORE[0]] * 2
  assert [line['step'] for line in after.probed()] == [10, 90]
  assert {line['statistics'] for line in after.lines} == {'population'}
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


def add_training_line(run, **timing):
  timing |= {'seconds': 9.0, 'cpu_seconds': 2.5, 'shares': {'step': 1.0}}
  line = {'step': 10, 'split': 'train', 'loss': 2.0, 'timing': timing}
  path = run / 'metrics.jsonl'
  path.write_text(f'{json.dumps(line)}\n{path.read_text()}')


@pytest.mark.parametrize('part', ['fashion_mnist', 'section_421'])
def test_what_is_kept_of_a_run(part, tmp_path, monkeypatch):
  """All lines of Fig. 2; of other sweeps their table, and the facts."""
  monkeypatch.setattr(study, 'ROOT', tmp_path / 'root')
  folder = tmp_path / 'out' / part
  write_run(folder / 'run', 'bn_x5', [0.5, 0.6])
  add_training_line(folder / 'run')
  for name in study.RESULTS:
    (folder / name).write_text(name)
  study.publish(part, folder)
  copy = study.ROOT / 'results' / part
  names = {path.name for path in copy.rglob('*') if path.is_file()}
  if part == 'section_421':
    assert names == {'run.json', *study.RESULTS}
    return
  run = runs_lib.read_run(copy / 'run')
  assert len(run.lines) == 5
  assert run.lines[0]['timing'] == {'seconds': 9.0, 'cpu_seconds': 2.5}
  assert run.curve('validation', 'accuracy', 'moving') == [(10, 0.1), (20, 0.1)]


def test_what_is_kept_of_fig_1_at_other_settings(tmp_path, monkeypatch):
  """Accuracies: percentiles would be most of what is published."""
  monkeypatch.setattr(study, 'ROOT', tmp_path / 'root')
  folder = tmp_path / 'out' / 'fig1_settings'
  write_run(folder / 'run', 'bn_mnist', [0.5, 0.9])
  add_percentiles(folder / 'run', BEFORE)
  study.publish('fig1_settings', folder)
  run = runs_lib.read_run(study.ROOT / 'results/fig1_settings/run')
  assert run.accuracies() == [0.5, 0.9] and run.probed() == []


def test_the_report_of_what_is_published(tmp_path, monkeypatch):
  """It has the costs that the runs recorded."""
  monkeypatch.setattr(study, 'ROOT', tmp_path / 'root')
  folder = tmp_path / 'out' / 'fashion_mnist'
  for variant in ('inception', 'bn_x5'):
    run = folder / f'{variant}_seed0'
    write_run(run, variant, [0.8] * 5)
    edit_facts(run, multiply_adds=1000)
    add_training_line(run, images_per_second=64.0)
  study.publish('fashion_mnist', folder)
  results = study.ROOT / 'results'
  assert study.report(results, results / 'report') == []
  page = (results / 'report' / 'index.html').read_text()
  # 9 seconds of 64 images a second took 2.5 of CPU time; 320 images are asked.
  assert f'{2.5 / (9 * 64) * 320 / 60:.2g} (' in page
  # Without the search, nothing is said about it.
  assert 'lengths and decays' not in page
