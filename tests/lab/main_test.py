"""The command of the laboratory, and its pages."""

import json
import math

import pytest

from bn_repro.errors import UserError
from bn_repro.lab import __main__ as lab
from bn_repro.lab import findings, gradients
from bn_repro.report.verdicts import FAILS, HOLDS, UNDECIDED

SMALL = (
  *('gradients', '--quick', '--config.batch_size=32'),
  *('--config.model.depth=8', '--config.model.width=16'),
)


def run(folder, *arguments):
  return lab.main([*SMALL, f'--workdir={folder}', *arguments])


def test_what_is_written_and_resumed(tmp_path, monkeypatch, capsys):
  """A seed that is complete is not run again; the others are as if alone."""
  whole, folder = tmp_path / 'whole', tmp_path / 'runs'
  assert run(whole, '--config.num_seeds=5') == 0
  seeds = []
  compute = gradients.run

  def interrupted(config, seed):
    seeds.append(seed)
    if len(seeds) == 3:
      raise KeyboardInterrupt
    return compute(config, seed)

  monkeypatch.setattr(gradients, 'run', interrupted)
  with pytest.raises(KeyboardInterrupt):
    run(folder, '--config.num_seeds=5')
  assert run(folder, '--config.num_seeds=5') == 0
  assert seeds == [0, 1, 2, 2, 3, 4]
  files = {path.name: path.read_bytes() for path in folder.iterdir()}
  assert files == {path.name: path.read_bytes() for path in whole.iterdir()}
  assert files.keys() == {
    *('gradients.json', 'gradients.png', 'gradients.md', 'index.md')
  }
  page = files['index.md'].decode()
  assert ' of 2 findings hold here, ' in page
  assert '[Gradient explosion at initialization.](gradients.md)' in page
  assert page.count('| Yang et al. 2019') == 1
  assert 'wrote ' in capsys.readouterr().out


@pytest.mark.parametrize(
  'arguments, problem',
  [
    (('--config.model.depth=9',), 'has results of another config'),
    (('--config.model.dept=9',), "Did you mean 'model.depth'?"),
    (('--config.model.depth=x',), "'x' is not"),
    (('--config.num_seeds=0',), 'config.num_seeds=0: must be positive'),
    (('--config.model.depth=2',), 'config.model.depth=2: the growth is'),
  ],
)
def test_bad_input(arguments, problem, tmp_path, capsys):
  assert run(tmp_path) == 0
  before = {path: path.read_bytes() for path in tmp_path.iterdir()}
  capsys.readouterr()
  assert run(tmp_path, *arguments) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and problem in line
  assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_results_of_other_numerics(tmp_path, monkeypatch, capsys):
  assert run(tmp_path) == 0
  monkeypatch.setattr(lab.numerics, 'digest', lambda: 'another')
  assert run(tmp_path) == 1
  assert 'of code that computes other' in capsys.readouterr().err


def test_an_unknown_experiment(tmp_path, capsys):
  assert lab.main(['gradient', f'--workdir={tmp_path}']) == 1
  said = capsys.readouterr().err
  assert f"'gradient': no such experiment. There are {lab.names()[0]}" in said
  assert 'gradients' in said


@pytest.mark.parametrize(
  'override, problem',
  [
    ('batch_size=0', 'must be positive and finite'),
    ('learning_rate=-1.0', 'must be positive and finite'),
    ('learning_rate=nan', 'must be positive and finite'),
    ('learning_rate=inf', 'must be positive and finite'),
    ('model.width=0', 'must be positive and finite'),
    ('model.depth=-1', 'must be positive and finite'),
    ('model.dtype=foo', 'must be one of'),
    ('data.fold=9', 'must be 0 to 4'),
    ('momentum=1.0', 'must be at least 0 and below 1'),
    ('bn_momentum=-0.1', 'must be at least 0 and below 1'),
  ],
)
def test_values_that_no_experiment_takes(override, problem):
  with pytest.raises(UserError, match=problem):
    lab.load('norms', [override], quick=True)


@pytest.mark.parametrize(
  'values, verdict',
  [
    ([1.1, 1.2, 1.3, 1.2, 1.1], HOLDS),
    ([1.1, 1.2, 1.3, 1.2, 0.9], UNDECIDED),
    ([2.1, 3.2, 0.3, 2.2, 9.9], FAILS),
    ([2.1, 3.2, 2.3, 1.5, 9.9], UNDECIDED),
    ([1.1, 1.2, 1.3, 1.2], UNDECIDED),
  ],
)
def test_verdicts(values, verdict):
  finding = findings.Finding('x', 'y', lambda r: r['x'], 1.0, 2.0, ' per layer')
  results = [{'x': value} for value in values]
  assert finding.verdict(results) == verdict
  assert finding.ours([{'x': 1.5}]) == '1.5 per layer'
  line, table = findings.markdown([(finding, results)])
  assert line.startswith(f'{int(verdict == HOLDS)} of 1 findings hold here')
  assert table.splitlines()[-1].endswith(f'| {verdict} |')


def test_one_side_is_enough():
  """A finding without an upper bound."""
  finding = findings.Finding('x', 'y', lambda r: r['x'], 0.0)
  assert finding.high == math.inf
  assert finding.verdict([{'x': 1.0}] * 5) == HOLDS


def test_every_experiment_can_be_loaded():
  for name in lab.names():
    for quick in (False, True):
      config = lab.load(name, (), quick=quick)
      assert config.num_seeds == (1 if quick else 5)
      assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
