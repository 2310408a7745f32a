"""Runs read from workdirs and grouped."""

import json
import math

import pytest
from written_runs import edit_facts, read_one, read_sections, write_run

from bn_repro import numerics
from bn_repro.errors import UserError
from bn_repro.report import runs as runs_lib
from bn_repro.report.runs import Spread
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


def test_runs_of_other_settings_are_not_other_seeds(tmp_path):
  for seed in (0, 1):
    write_run(tmp_path / f's{seed}', 'bn_x5', [0.5], f'seed={seed}')
  write_run(tmp_path / 'own', 'bn_x5', [0.5], 'optim.learning_rate=0.7')
  write_run(tmp_path / 'log', 'bn_x5', [0.5], 'seed=3', 'log_every=7')
  # The best accuracy depends on how often a run is evaluated.
  for seed in (4, 5):
    overrides = f'seed={seed}', 'eval_every=50'
    write_run(tmp_path / f'eval{seed}', 'bn_x5', [0.5], *overrides)
  runs, _ = runs_lib.read_runs([str(tmp_path)])
  (section,), (problem,) = runs_lib.sections(runs)
  assert section.is_sweep
  found = {section.label(group): len(group.runs) for group in section.groups}
  assert found == {'BN-x5, eval_every=20': 3, 'BN-x5, eval_every=50': 2}
  # A third of the three is too few for a value of a sweep.
  assert problem == (
    f'{tmp_path.name}/own: left out, because its setting is not that of the 3 '
    'runs beside it: optim.learning_rate 0.7, not 0.1.'
  )


def test_unfinished_runs_are_shown_only_if_no_other_has_ended(tmp_path):
  for variant, states in (
    ('bn_x5', ('done', 'diverged', 'running')),
    ('bn_x30', ('preempted', 'running')),
  ):
    for seed, status in enumerate(states):
      folder = tmp_path / f'{variant}_{status}'
      write_run(folder, variant, [0.5], f'seed={seed}', status=status)
  runs, _ = runs_lib.read_runs([str(tmp_path)])
  (section,), problems = runs_lib.sections(runs)
  assert [[run.name for run in group.runs] for group in section.groups] == [
    ['bn_x5_done', 'bn_x5_diverged'],
    ['bn_x30_preempted', 'bn_x30_running'],
  ]
  place = tmp_path.name
  assert sorted(problems) == [
    f'{place}/bn_x30_preempted: shown, not judged, because it is unfinished: '
    'preempted at step 10.',
    f'{place}/bn_x30_running: shown, not judged, because it is unfinished: '
    'running at step 10.',
    f'{place}/bn_x5_running: left out, because it is unfinished: running at '
    'step 10.',
  ]


def test_an_unfinished_stray_run_is_named_once(tmp_path):
  for seed in range(3):
    write_run(tmp_path / f's{seed}', 'bn_x5', [0.5], f'seed={seed}')
  stray = tmp_path / 'stray'
  write_run(stray, 'bn_x5', [0.5], 'total_steps=900', status='running')
  runs, _ = runs_lib.read_runs([str(tmp_path)])
  _, (problem,) = runs_lib.sections(runs)
  assert problem.startswith(
    f'{tmp_path.name}/stray: left out, because its setting is not that of the 3'
  )


def test_runs_repeat_a_setting_by_seed_and_fold(tmp_path):
  """Networks are compared on the same seed and the same fold."""
  for variant in ('inception', 'bn_x5'):
    for seed, fold in ((0, 0), (1, 1), (0, 2)):
      write_run(
        tmp_path / f'{variant}_{seed}_{fold}',
        variant,
        [0.1 * seed + 0.2 * fold],
        f'seed={seed}',
        f'data.fold={fold}',
      )
  (section,) = read_sections(tmp_path)
  assert not section.is_sweep and section.mismatches() == []
  found = section.by_seed('bn_x5', 'inception')
  assert list(found) == [(0, 0), (0, 2), (1, 1)]
  assert [str(one) for one in found] == ['0', '0 (fold 2)', '1 (fold 1)']
  names = [[run.name for (run,) in runs] for runs in found.values()]
  assert names == [
    ['bn_x5_0_0', 'inception_0_0'],
    ['bn_x5_0_2', 'inception_0_2'],
    ['bn_x5_1_1', 'inception_1_1'],
  ]
  write_run(tmp_path / 'twice', 'bn_x5', [0.5], 'seed=1', 'data.fold=1')
  runs, _ = runs_lib.read_runs([str(tmp_path)])
  _, (problem,) = runs_lib.sections(runs)
  assert problem == (
    f'{tmp_path.name}/twice: left out, because {tmp_path.name}/bn_x5_1_1 has '
    'the same config, seed and fold.'
  )


@pytest.mark.parametrize('data_name', ['mnist_5k', 'fashion_mnist'])
def test_runs_from_before_there_were_folds(data_name, tmp_path):
  """On mnist_5k they were tested on other digits, and form another group."""
  for name in ('old', 'new'):
    write_run(tmp_path / name, 'bn_x5', [0.5], f'data.name={data_name}')
  path = tmp_path / 'old' / 'config.json'
  saved = json.loads(path.read_text())
  del saved['data']['fold']
  path.write_text(json.dumps(saved))
  runs, _ = runs_lib.read_runs([str(tmp_path)])
  (section,), problems = runs_lib.sections(runs)
  if data_name == 'mnist_5k':
    labels = [section.label(group) for group in section.groups]
    assert sorted(labels) == ['BN-x5', 'BN-x5, data.fold=-1']
    assert section.mismatches() == ['data.fold (None, -1)']
    assert problems == []
  else:
    assert len(section.groups) == len(problems) == 1


def test_sections_are_by_folder_network_and_data(tmp_path):
  write_run(tmp_path / 'one' / 'a', 'bn_x5', [0.5])
  write_run(tmp_path / 'one' / 'b', 'inception', [0.5])
  write_run(tmp_path / 'one' / 'c', 'inception', [0.5], 'data.name=mnist')
  write_run(tmp_path / 'one' / 'd', 'mnist', [0.5])
  write_run(tmp_path / 'two' / 'a', 'bn_x5', [0.5])
  found = {
    (section.folder.name, section.data_name, section.network): [
      group.variant for group in section.groups
    ]
    for section in read_sections(tmp_path)
  }
  assert found == {
    ('one', 'mnist_5k', 'inception'): ['inception', 'bn_x5'],
    ('one', 'mnist', 'inception'): ['inception'],
    ('one', 'mnist_5k', 'mlp'): ['mnist'],
    ('two', 'mnist_5k', 'inception'): ['bn_x5'],
  }


@pytest.mark.parametrize(
  'values, shown',
  [
    ([3.0, 1.0, 2.0], '2 (1 to 3)'),
    # A seed that never reaches the target took longest.
    ([10.0, None, 20.0], '20 (10 to never)'),
    ([10.0, None, None], 'never (10 to never)'),
    ([4.0], '4'),
    ([None], 'never'),
    # Of an even number, the mean of the two in the middle.
    ([1.0, 2.0], '1.5 (1 to 2)'),
    ([4.0, 1.0, 2.0, 10.0], '3 (1 to 10)'),
    ([10.0, None], 'never (10 to never)'),
    ([10.0, None, 20.0, 30.0], '25 (10 to never)'),
    ([], '–'),
  ],
)
def test_spread_of_steps(values, shown):
  assert Spread(values).show('{:g}'.format) == shown


def test_spread_of_factors():
  """A seed that never reaches the target has the smallest factor."""
  spread = Spread([2.0, None, 3.0], never=-math.inf)
  assert spread.show('{:g}'.format) == '2 (never to 3)'


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


def test_other_numerics_are_counted_by_section(tmp_path):
  for folder, digest in (('x', None), ('y', None), ('z', 'abc')):
    write_run(tmp_path / folder / 'run', 'inception', [0.5])
    edit_facts(tmp_path / folder / 'run', numerics=digest)
  write_run(tmp_path / 'x' / 'good', 'bn_x5', [0.5])
  write_run(tmp_path / 'good' / 'run', 'inception', [0.5])
  runs, _ = runs_lib.read_runs([str(tmp_path)])
  sections, _ = runs_lib.sections(runs)
  messages = runs_lib.other_numerics(sections)
  ours = f'than those of this code ({numerics.digest()})'
  for message, beginning in zip(
    messages,
    (
      'x: 1 of 2 runs were made by other numerics (not recorded)',
      'y: 1 of 1 runs were made by other numerics (not recorded)',
      'z: 1 of 1 runs were made by other numerics (abc)',
    ),
    strict=True,
  ):
    assert message.startswith(f'{beginning} {ours}')
    assert ': run. ' in message


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
