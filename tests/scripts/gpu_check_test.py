"""Checks of a GPU, tried on the CPU."""

import json
from pathlib import Path
import signal

import gpu_check
from gpu_checks import outcomes, precision, training
import pytest
import support

from bn_repro.errors import UserError
from bn_repro.models import batch_norm

PROGRAM = ('scripts/gpu_check.py',)
README = (support.ROOT / 'results/gpu/README.md').read_text()


@pytest.fixture
def settings(tmp_path):
  return outcomes.Settings('cpu', tmp_path / 'out', quick=True)


def failing(figures):
  return [figure.name for figure in figures if not figure.holds]


def test_our_bn_holds(settings):
  figures = precision.batch_norm(settings)
  assert len(figures) == 2 * len(precision.FORMS) - 2
  assert failing(figures) == []


@pytest.mark.parametrize(
  'function, wrong, array',
  [
    ('unbiased_variance', lambda var, m: var, 'var'),
    # Not the shares that pass through the statistics.
    (
      'batch_norm_gradients',
      lambda x, gamma, mu, var, m, dy, dmu, dvar, *_: (
        gamma * dy,
        *[(dy * (x - mu)).sum((1, 2, 3), keepdims=True)] * 4,
      ),
      'dx',
    ),
  ],
)
def test_wrong_bn_fails(settings, monkeypatch, function, wrong, array):
  monkeypatch.setattr(batch_norm, function, wrong)
  forms = {'one reduction': precision.Form(), 'groups': precision.Form(group=8)}
  monkeypatch.setattr(precision, 'FORMS', forms)
  figures = precision.batch_norm(settings)
  assert len(failing(figures)) == 4
  if array == 'var':
    assert all(f'error of {array},' in figure.name for figure in figures)


def figure(value):
  return outcomes.Figure('size', value, at_most=1.0)


@pytest.fixture
def fakes(monkeypatch):
  """Checks that run in this process; the list of those that were called."""
  called = []

  def check(name, value):
    def run(settings):
      called.append(name)
      if isinstance(value, BaseException):
        raise value
      return [figure(value)]

    return run

  def install(**values):
    called.clear()
    checks = {name: check(name, value) for name, value in values.items()}
    monkeypatch.setattr(gpu_check, 'CHECKS', checks)
    return called

  def run_here(name, settings, output=None):
    return gpu_check.run_one(name, settings)

  monkeypatch.setattr(gpu_check, 'run_in_child', run_here)
  return install


def test_a_failing_check_stops_no_other_and_is_tried_again(
  settings, fakes, capsys
):
  fakes(good=0.5, bad=2.0, nan=float('nan'), broken=OSError('no disk'), last=0)
  assert gpu_check.run_all(settings) == 1
  said = capsys.readouterr()
  assert said.err.splitlines()[-1] == (
    'error: these checks failed: bad, nan, broken'
  )
  assert 'size  2  at most 1  FAILS' in said.out
  stored = json.loads(settings.json.read_text())['checks']
  assert list(stored) == ['good', 'bad', 'nan', 'broken', 'last']
  assert stored['nan']['figures'][0]['value'] is None
  table = settings.json.with_suffix('.md').read_text()
  assert table.startswith('2 of 5 checks hold.')
  assert '| broken | ended early |  |  | FAILS | OSError: no disk |' in table
  called = fakes(good=0.5, bad=1.0, nan=0.0, broken=0.0, last=0.0)
  assert gpu_check.run_all(settings) == 0
  assert called == ['bad', 'nan', 'broken']


def test_an_interruption_keeps_what_is_done(settings, fakes):
  called = fakes(first=0.5, second=KeyboardInterrupt(), third=0.5)
  with pytest.raises(KeyboardInterrupt):
    gpu_check.run_all(settings)
  assert called == ['first', 'second']
  assert list(outcomes.read(settings.json).outcomes) == ['first']
  called = fakes(first=0.5, second=0.5, third=0.5)
  assert gpu_check.run_all(settings) == 0
  assert called == ['second', 'third']


def test_a_process_that_aborts_is_a_failure(settings, fakes, monkeypatch):
  fakes(first=0.5, second=0.5)
  run_here = gpu_check.run_in_child
  monkeypatch.setattr(
    gpu_check,
    'run_in_child',
    lambda name, *rest: -6 if name == 'first' else run_here(name, *rest),
  )
  assert gpu_check.run_all(settings) == 1
  found = outcomes.read(settings.json).outcomes
  assert found['first'].error.startswith('exit code -6, see ')
  assert found['second'].passed


def test_one_file_is_of_one_machine_and_one_way_to_check(settings, fakes):
  fakes(first=0.5)
  with pytest.raises(UserError, match='run the check "machine" first'):
    gpu_check.run_one('first', settings)
  assert not settings.out.exists()
  assert gpu_check.run_all(settings) == 0
  full = settings._replace(quick=False)
  for name in ('machine', 'first'):
    with pytest.raises(UserError, match='other flags'):
      gpu_check.run_one(name, full)
  settings.json.write_text('{}')
  with pytest.raises(UserError, match='not a file of this command'):
    gpu_check.run_all(settings)


def test_without_a_gpu_it_refuses(tmp_path):
  out = tmp_path / 'out'
  said = support.run(f'--out={out}', program=PROGRAM, CUDA_VISIBLE_DEVICES='-1')
  assert (said.returncode, said.stdout) == (1, '')
  (line,) = said.stderr.splitlines()
  assert line.startswith('error: --platform=gpu: JAX finds no such device')
  assert not out.exists()


def test_runs_that_differ_are_seen(settings, monkeypatch):
  def run(command, **environment):
    (workdir,) = (
      Path(argument.partition('=')[2])
      for argument in command
      if argument.startswith('--workdir=')
    )
    workdir.mkdir(parents=True, exist_ok=True)
    switched = environment.get('XLA_FLAGS', '').split()
    expected = workdir.name in ('first', 'second', 'stopped')
    assert ('--xla_gpu_deterministic_ops=true' in switched) == expected

  monkeypatch.setattr(training, '_run', run)
  monkeypatch.setattr(training, '_stop_at_first_line', run)
  # Of a model, its digest, and facts that may differ.
  results = {
    'first': [1, 2, (3, 'facts'), 4],
    'second': [1, 2, (0, 'facts'), 4],
    'stopped': [1, 2, (3, 'of another revision'), 4],
    'without': [5, 2, (3, 'facts'), 4],
    'again': [6, 2, (3, 'facts'), 5],
  }
  monkeypatch.setattr(
    training.fault_injection,
    'result_of_run',
    lambda path: results[path.name],
  )
  two, resumed, without = training.determinism(settings)
  assert (two.value, two.note, two.holds) == (1, 'model', False)
  assert (resumed.value, resumed.holds) == (0, True)
  # Without the switch nothing is promised.
  assert (without.value, without.note) == (2, 'metrics, status')
  assert without.holds


@pytest.mark.parametrize('accuracy, holds', [(0.94, True), (0.9, False)])
def test_accuracies_are_compared_with_those_of_the_cpu(
  settings, monkeypatch, accuracy, holds
):
  """BN-x5 ends between 0.951 and 0.972 in `results/mnist_5k`."""

  def run(command):
    line = {'step': 500, 'split': 'test', 'accuracy': accuracy}
    folder = settings.runs('mnist_5k') / 'bn_x5_seed0'
    folder.mkdir(parents=True)
    (folder / 'metrics.jsonl').write_text(f'{json.dumps(line)}\n')

  monkeypatch.setattr(training, '_run', run)
  monkeypatch.setattr(training, 'SWEEPS', {'mnist_5k': ('bn_x5',)})
  (found,) = training.variants(settings._replace(quick=False))
  assert found.value == accuracy and found.holds == holds
  assert found.at_least == pytest.approx(0.93)
  assert found.at_most == pytest.approx(0.993)
  assert found.note == 'on CPU, 5 seeds: 0.951 to 0.972'


def test_the_page_states_the_bounds():
  bounds = [form.bound for form in precision.FORMS.values()]
  bounds += [precision.BN_BFLOAT16]
  for _, _, of_step in precision.STEPS.values():
    bounds += of_step
  assert [b for b in bounds if f'{b:g}' not in README] == []


def test_wheels_for_an_image_are_those_of_the_requirements():
  pins, all_pins = (
    {
      line
      for line in (support.ROOT / name).read_text().splitlines()
      if line and line[0] != '#'
    }
    for name in ('requirements-gpu-image.txt', 'requirements.txt')
  )
  assert pins and pins <= all_pins
  assert all(f'| {pin.replace("==", " | ")} |' in README for pin in pins)


@pytest.mark.slow
def test_all_checks_hold_on_the_cpu_after_an_interruption(tmp_path):
  arguments = (f'--out={tmp_path}', '--platform=cpu', '--quick')
  process = support.start(*arguments, program=PROGRAM)
  support.wait_for_line(process, 'bfloat16: check 3 of 8')
  process.send_signal(signal.SIGTERM)
  (said,) = support.finish(process)
  assert (said.returncode, said.stderr) == (1, 'error: stopped\n')
  found = outcomes.read(tmp_path / 'gpu_check.json').outcomes
  assert list(found) == ['batch_norm', 'step']
  said = support.run(*arguments, program=PROGRAM)
  assert said.returncode == 0, said.stdout + said.stderr
  assert said.stdout.startswith('bfloat16: check 1 of 6; output in ')
  assert said.stdout.endswith('all checks hold\n')
  found = outcomes.read(tmp_path / 'gpu_check.json').outcomes
  assert list(found) == list(gpu_check.CHECKS)
