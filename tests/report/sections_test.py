"""Which runs are compared with each other, and which are left out."""

import json
import math

import pytest
from written_runs import edit_facts, read_sections, write_run

from bn_repro import numerics
from bn_repro.report import runs as runs_lib
from bn_repro.report import sections as sections_lib
from bn_repro.report.sections import Spread


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
  (section,), (problem,) = sections_lib.group(runs)
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
  (section,), problems = sections_lib.group(runs)
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
  _, (problem,) = sections_lib.group(runs)
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
  _, (problem,) = sections_lib.group(runs)
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
  (section,), problems = sections_lib.group(runs)
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


def test_other_numerics_are_counted_by_section(tmp_path):
  for folder, digest in (('x', None), ('y', None), ('z', 'abc')):
    write_run(tmp_path / folder / 'run', 'inception', [0.5])
    edit_facts(tmp_path / folder / 'run', numerics=digest)
  write_run(tmp_path / 'x' / 'good', 'bn_x5', [0.5])
  write_run(tmp_path / 'good' / 'run', 'inception', [0.5])
  runs, _ = runs_lib.read_runs([str(tmp_path)])
  sections, _ = sections_lib.group(runs)
  messages = sections_lib.other_numerics(sections)
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
