"""Runs read from workdirs."""

import json

import pytest
from written_runs import edit_facts, read_one, write_run

from bn_repro.errors import UserError
from bn_repro.report import runs as runs_lib
from bn_repro.runtime.workdir import MetricsDigest, write_json


def test_steps_are_equivalent_steps(tmp_path):
  """Batch 64 counts double on the paper's axis."""
  write_run(tmp_path / 'run', 'bn_x5', [0.1, 0.8, 0.9], 'batch_size=64')
  run = read_one(tmp_path)
  assert run.steps_to(0.8) == 40
  assert run.steps_to(0.85) == 60
  assert run.steps_to(0.95) is None


def test_best_is_of_five_evaluations_in_a_row(tmp_path):
  write_run(tmp_path / 'a', 'bn_x5', [0.1, 0.5, 0.6, 0.5, 0.7, 0.6, 0.1])
  write_run(tmp_path / 'b', 'bn_x5', [0.2, 0.4], 'seed=1')
  (long, short), _ = runs_lib.read_runs([str(tmp_path)])
  assert long.best() == pytest.approx((0.5 + 0.6 + 0.5 + 0.7 + 0.6) / 5)
  assert long.mean_of_last() == pytest.approx((0.6 + 0.5 + 0.7 + 0.6 + 0.1) / 5)
  assert long.mean_of_last(7) == pytest.approx(3.1 / 7)
  # Of fewer evaluations there is no such mean.
  assert (short.best(), short.mean_of_last()) == (None, None)
  assert long.mean_of_last(8) is None
  assert short.mean_of_last(2) == pytest.approx(0.3)


@pytest.mark.parametrize(
  'count, status, is_comparable',
  [
    (5, 'done', True),
    (4, 'done', False),
    (0, 'diverged', True),
    (4, 'running', False),
    (6, 'preempted', True),
  ],
)
def test_runs_that_can_be_compared(count, status, is_comparable, tmp_path):
  write_run(tmp_path / 'a', 'bn_x5', [0.5] * count, status=status)
  assert read_one(tmp_path).is_comparable == is_comparable


def test_test_accuracy_is_that_after_the_last_step(tmp_path):
  """An earlier evaluation on test images is not."""
  split = 'eval_split=test'
  write_run(tmp_path / 'a', 'bn_x5', [0.5, 0.7], split)
  write_run(tmp_path / 'b', 'bn_x5', [0.5], split, status='diverged', step=17)
  write_run(tmp_path / 'c', 'bn_x5', [0.5], split, status='running')
  runs, _ = runs_lib.read_runs([str(tmp_path)])
  assert [run.test_accuracy() for run in runs] == [0.7, None, None]


@pytest.mark.parametrize(
  'facts, data_name, chance',
  [
    ({'num_classes': 5}, 'mnist_5k', 0.2),
    # Up to revision 3a68ec7 `run.json` has no `num_classes`.
    ({}, 'mnist_5k', 0.1),
    ({}, 'imagenet2012', 0.001),
  ],
)
def test_chance_is_of_the_number_of_classes(facts, data_name, chance, tmp_path):
  write_run(tmp_path / 'a', 'bn_x5', [0.5], f'data.name={data_name}')
  (tmp_path / 'a' / 'run.json').write_text(json.dumps(facts))
  assert read_one(tmp_path).chance == chance


def test_population_statistics_are_preferred(tmp_path):
  write_run(tmp_path / 'a', 'bn_x5', [0.5])
  run = read_one(tmp_path)
  assert run.accuracies() == [0.5]
  assert run.curve('validation', 'accuracy', 'moving') == [(10.0, 0.1)]


def test_a_run_named_twice_counts_once(tmp_path):
  write_run(tmp_path / 'plain', 'inception', [0.5])
  runs, _ = runs_lib.read_runs([str(tmp_path), str(tmp_path / 'plain')])
  assert len(runs) == 1


def test_runs_of_revision_3a68ec7_have_the_same_setting(tmp_path):
  """Their configs have a field `data.stand_in`."""
  for name in ('old', 'new'):
    write_run(tmp_path / name, 'inception', [0.5])
  path = tmp_path / 'old' / 'config.json'
  config = json.loads(path.read_text())
  config['data']['stand_in'] = False
  path.write_text(json.dumps(config))
  old, new = (runs_lib.read_run(tmp_path / name) for name in ('old', 'new'))
  assert old.setting() == new.setting()


def start(numerics, step=0):
  return {'numerics': numerics, 'start_step': step}


@pytest.mark.parametrize(
  'facts, expected',
  [
    ({'numerics': None}, None),
    (start('abc'), 'abc'),
    ({**start('abc', 50), 'earlier_starts': [start('abc')]}, 'abc'),
    ({**start('def', 50), 'earlier_starts': [start('abc')]}, 'abc, then def'),
    (
      {**start('def', 50), 'earlier_starts': [{'start_step': 0}]},
      'unknown, then def',
    ),
    # The second start began again.
    (
      {**start('def', 50), 'earlier_starts': [start('abc'), start('def')]},
      'def',
    ),
  ],
)
def test_numerics_are_those_of_all_starts(facts, expected, tmp_path):
  write_run(tmp_path / 'a', 'inception', [0.5])
  edit_facts(tmp_path / 'a', **facts)
  assert read_one(tmp_path).numerics == expected


@pytest.mark.parametrize('line', ['3', '{"step": 1}', 'x'])
def test_run_with_a_damaged_line_is_named(line, tmp_path):
  write_run(tmp_path / 'good', 'inception', [0.5])
  write_run(tmp_path / 'damaged', 'bn_x5', [0.5])
  with (tmp_path / 'damaged' / 'metrics.jsonl').open('a') as file:
    file.write(line + '\n')
  runs, problems = runs_lib.read_runs([str(tmp_path)])
  assert [run.name for run in runs] == ['good']
  assert 'damaged' in problems[0]


@pytest.mark.parametrize(
  'name, old, new, expected',
  [
    ('metrics.jsonl', '0.5', '0.9', 'first 2 lines are not those'),
    ('status.json', '"step": 10', '"step": 90', 'does not match its checksum'),
    ('config.json', '"seed": 0', '"seed": 1', 'does not match its checksum'),
    ('run.json', '5', '6', 'does not match its checksum'),
  ],
)
def test_run_that_was_edited_is_left_out(name, old, new, expected, tmp_path):
  for folder in ('good', 'edited'):
    write_run(tmp_path / folder, 'inception', [0.5])
    path = tmp_path / folder
    lines = (path / 'metrics.jsonl').read_bytes().splitlines(keepends=True)
    for file in ('config.json', 'run.json', 'status.json'):
      content = json.loads((path / file).read_text())
      if file == 'status.json':
        content['metrics'] = MetricsDigest(lines).to_json()
      write_json(path / file, content)
  edited = tmp_path / 'edited' / name
  text = edited.read_text()
  assert old in text
  edited.write_text(text.replace(old, new))
  runs, (problem,) = runs_lib.read_runs([str(tmp_path)])
  assert [run.name for run in runs] == ['good']
  assert problem.startswith(f'{tmp_path / "edited"}: left out. {edited}: ')
  assert expected in problem


def test_half_a_line_at_the_end_is_ignored(tmp_path):
  write_run(tmp_path / 'killed', 'inception', [0.5, 0.6])
  with (tmp_path / 'killed' / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 30, "spl')
  assert read_one(tmp_path).accuracies() == [0.5, 0.6]


@pytest.mark.parametrize('correct', [401, 402, 403, 803])
def test_a_run_reaches_its_best_accuracy(correct, tmp_path):
  """Five equal accuracies of 500 or 1,000 images have this accuracy as mean."""
  accuracy = correct / (500 if correct < 500 else 1000)
  write_run(tmp_path / 'a', 'inception', [0.1, *[accuracy] * 5])
  run = read_one(tmp_path)
  assert run.best() == accuracy
  assert run.steps_to(run.best()) == 20


def test_lines_added_after_the_end_are_an_error(tmp_path):
  """They are none of the lines that `status.json` has the digest of."""
  write_run(tmp_path / 'a', 'bn_x5', [0.5] * 5)
  path = tmp_path / 'a' / 'metrics.jsonl'
  text = path.read_bytes()
  digest = MetricsDigest(text.splitlines(keepends=True)).to_json()
  status = json.loads((tmp_path / 'a' / 'status.json').read_text())
  write_json(tmp_path / 'a' / 'status.json', {**status, 'metrics': digest})
  assert read_one(tmp_path).best() == 0.5
  path.write_bytes(text + text.splitlines(keepends=True)[-1])
  with pytest.raises(
    UserError, match='has 11 lines, and the run ended with 10'
  ):
    runs_lib.read_run(tmp_path / 'a')
