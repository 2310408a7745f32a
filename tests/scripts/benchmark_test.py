"""What benchmarks print, write and refuse; none of them is run."""

import json
import statistics

import benchmark
from benchmarks import inputs, measure, record, steps
import pytest

from bn_repro.errors import UserError

# Seven rounds of two candidates.
RESULTS = {
  'ours': [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.02],
  'peer': [2.0, 2.1, 1.9, 2.2, 2.05, 1.95, 2.0],
}


def test_a_figure_is_the_ratio_of_medians():
  figure = measure.ratio(RESULTS, 'ours', 'peer')
  medians = [statistics.median(RESULTS[name]) for name in ('ours', 'peer')]
  assert figure.value == medians[0] / medians[1]
  by_round = [a / b for a, b in zip(*RESULTS.values(), strict=True)]
  assert (figure.low, figure.high) == (min(by_round), max(by_round))
  assert figure.doubt == ''
  assert str(figure) == 'ours over peer: 0.5 (by round 0.4634 to 0.5238)'


@pytest.mark.parametrize(
  'by_round, doubt',
  [
    # Quartiles 1.0 and 1.09, and 1.0 and 1.12; the medians are 1.0 and 1.1.
    ([0.5, 1.0, 1.0, 1.09, 9.0], ''),
    ([0.5, 1.0, 1.1, 1.12, 9.0], '11%'),
    ([1.0], 'one round'),
  ],
)
def test_rounds_that_differ_are_unreliable(by_round, doubt):
  figure = measure.median('ours', by_round, 'ms')
  assert doubt in figure.doubt
  assert bool(figure.doubt) == bool(doubt)


def test_candidates_take_turns_after_one_call_each():
  calls = []

  def candidate(name):
    return lambda: calls.append(name) or float(len(calls))

  results = measure.interleaved({n: candidate(n) for n in 'ab'}, rounds=3)
  assert ''.join(calls) == 'abababab'
  assert results == {'a': [3.0, 5.0, 7.0], 'b': [4.0, 6.0, 8.0]}


FIGURES = [
  measure.ratio(RESULTS, 'ours', 'peer'),
  measure.Figure('memory', 3.25, 'GB'),
]


@pytest.fixture
def fake(monkeypatch):
  """A benchmark that returns `FIGURES`, on an idle machine."""
  monkeypatch.setitem(benchmark.BENCHMARKS, 'bn', lambda rounds: FIGURES)
  monkeypatch.setattr(benchmark, 'share_in_use', lambda: 0.0)


def test_file_of_figures_and_its_table(fake, tmp_path, capsys, monkeypatch):
  path = tmp_path / 'figures.json'
  monkeypatch.setitem(benchmark.BENCHMARKS, 'step', lambda rounds: FIGURES[:1])
  for name in ('bn', 'step', 'bn'):
    assert benchmark.main([name, f'--json={path}', '--rounds=7']) == 0
  contents = json.loads(path.read_text())
  assert list(contents['benchmarks']) == ['bn', 'step']
  assert record.table(contents, ['bn', 'step']).splitlines()[2:] == [
    '| bn | ours over peer | 0.5 | 0.463 to 0.524 | 0% |',
    '| bn | memory | 3.25 GB |  | 0% |',
    '| step | ours over peer | 0.5 | 0.463 to 0.524 | 0% |',
  ]
  contents['machine']['cores'] += 1
  path.write_text(json.dumps(contents))
  assert benchmark.main(['bn', f'--json={path}']) == 1
  assert 'on another machine' in capsys.readouterr().err
  for text in ('', '[]', '{}'):
    path.write_text(text)
    assert benchmark.main(['bn', f'--json={path}']) == 1
    assert 'not a file of benchmarks' in capsys.readouterr().err


def test_busy_machine(fake, capsys, monkeypatch):
  monkeypatch.setattr(benchmark, 'share_in_use', lambda: 0.8)
  assert benchmark.main(['bn']) == 0
  said = capsys.readouterr().out
  assert '80% of the CPUs are in use' in said
  assert 'UNRELIABLE: the machine was busy' in said
  # A number of bytes is what it is.
  assert 'memory: 3.25 GB\n' in said


def test_missing_peer_is_named(capsys, monkeypatch):
  monkeypatch.setattr(benchmark.backend, 'import_jax', lambda: None)
  monkeypatch.setitem(benchmark.sys.modules, 'torch', None)
  monkeypatch.setattr(benchmark, 'share_in_use', lambda: 0.0)
  for name in ('bn', 'torch'):
    assert benchmark.main([name]) == 1
    errors = capsys.readouterr().err
    assert 'PyTorch is not installed' in errors
    assert 'requirements-dev.txt' in errors
  monkeypatch.setattr(
    steps.compile_check.importlib.util, 'find_spec', lambda name: None
  )
  assert benchmark.main(['tpu']) == 1
  assert 'requirements-tpu.txt' in capsys.readouterr().err
  monkeypatch.setattr(
    inputs.subprocess, 'run', lambda *_, **__: type('', (), {'returncode': 1})
  )
  assert benchmark.main(['input']) == 1
  assert 'TensorFlow could not be installed' in capsys.readouterr().err


def test_last_line_of_input():
  figures = [
    measure.Figure(inputs.PSNR, 42.61),
    measure.Figure(inputs.PSNR_TF_DATA, 39.14),
    measure.Figure(inputs.RATIO, 2.034),
  ]
  line = 'ratio=2.03 psnr=42.6 psnr_tfdata=39.1'
  assert inputs.last_line(figures) == line


@pytest.mark.parametrize('arguments', [['all'], ['bn', '--budget']])
def test_flags_that_do_not_go_together(arguments):
  with pytest.raises(UserError):
    benchmark.main(arguments)
