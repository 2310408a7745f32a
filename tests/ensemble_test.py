"""The command that averages probabilities."""

import csv
import itertools
from pathlib import Path
import subprocess
import sys

from matplotlib import image as mpl_image
import numpy as np
import pytest
from written_probabilities import LABELS, correct_at, random, write

from bn_repro import ensemble


def run(capsys, *arguments):
  code = ensemble.main([str(argument) for argument in arguments])
  captured = capsys.readouterr()
  return code, captured.out, captured.err


@pytest.fixture
def three(tmp_path):
  """Three networks that are right at 4, 5 and 3 of 8 images."""
  places = {'a': (0, 1, 2, 3), 'b': (0, 1, 4, 5, 6), 'c': (0, 2, 5)}
  return [
    write(tmp_path / name / 'test-1.npz', correct_at(*right))
    for name, right in places.items()
  ]


def table(lines):
  """The cells of a table, which are two spaces or more apart."""
  return [[cell.strip() for cell in line.split('  ') if cell] for line in lines]


def test_by_hand(three, capsys):
  code, out, err = run(capsys, *three)
  assert (code, err) == (0, '')
  first, _, *lines = out.splitlines()
  assert first == '8 test images of mnist_5k, 1 crop of each'
  networks, sizes = table(lines[:5]), table(lines[8:])
  assert [row[:2] for row in networks[1:]] == [
    ['a', '50.00 % (4)'],
    ['b', '62.50 % (5)'],
    ['c', '37.50 % (3)'],
    # Right at 0, 1, 2 and 5, where two are.
    ['all 3', '50.00 % (4)'],
  ]
  # All classes of three are among the highest five.
  assert {row[2] for row in networks[1:]} == {'100.00 % (8)'}
  assert sizes[0] == ['networks', 'subsets', 'top-1', 'top-5']
  assert sizes[1][:3] == ['1', '3', '50.00 % (37.50 to 62.50)']
  assert sizes[3][:3] == ['3', '1', '50.00 %']
  # Of two that differ, the lower class counts: the label, unless it is 2, which
  # is taken for 0. So 5, 4 and 5 are right.
  assert sizes[2][:3] == ['2', '3', '58.33 % (50.00 to 62.50)']


def test_subsets_in_a_file_and_a_figure(tmp_path, capsys):
  """Each subset as computed here; mean and range from the file."""
  drawn = [random(seed, count=300) for seed in range(4)]
  paths = [
    write(tmp_path / str(number) / 'test-144.npz', *one, crops=144)
    for number, one in enumerate(drawn)
  ]
  out = tmp_path / 'subsets.csv', tmp_path / 'subsets.png'
  code, printed, _ = run(capsys, *paths, f'--csv={out[0]}', f'--plot={out[1]}')
  assert code == 0
  assert printed.splitlines()[0].endswith(', 144 crops of each')
  rows = list(csv.DictReader(out[0].read_text().splitlines()))
  by_size = {size: [] for size in (1, 2, 3, 4)}
  for row in rows:
    members = [int(name) for name in row['networks'].split()]
    mean = np.mean([np.float64(drawn[k][0]) for k in members], axis=0)
    right = (mean.argmax(1) == drawn[0][1]).sum()
    assert int(row['correct']) == right
    by_size[len(members)].append((tuple(members), right / 300))
  for size, found in by_size.items():
    subsets, accuracies = zip(*found, strict=True)
    assert list(subsets) == list(itertools.combinations(range(4), size))
    line = f'{size}         {len(found)}        {100 * np.mean(accuracies):.2f}'
    low, high = 100 * min(accuracies), 100 * max(accuracies)
    if size < 4:
      line += f' % ({low:.2f} to {high:.2f})'
    assert line in printed
  assert mpl_image.imread(out[1]).shape[1] > 1000


@pytest.mark.parametrize(
  'paths, expected',
  [
    ('/r/a/p/x.npz /r/b/p/x.npz', 'a b'),
    ('/r/a/x.npz /r/a/y.npz', 'x.npz y.npz'),
    ('/r/a/p/x.npz /r/b/p/y.npz', 'a/p/x.npz b/p/y.npz'),
    ('/r/x.npz /r/a/x.npz', '. a'),
  ],
)
def test_networks_are_named_by_what_differs(paths, expected):
  names = ensemble._names([Path(path) for path in paths.split()])
  assert names == expected.split()


def test_many_networks_have_no_subsets(tmp_path, capsys):
  paths = [
    write(tmp_path / str(number) / 'x.npz', correct_at(number % 8))
    for number in range(ensemble.MAX_NETWORKS + 1)
  ]
  path = tmp_path / 'x.csv'
  assert run(capsys, *paths, f'--csv={path}')[0] == 0
  sizes = [row['size'] for row in csv.DictReader(path.read_text().splitlines())]
  assert sizes == ['1'] * 11 + ['11']
  assert run(capsys, *paths[1:], f'--csv={path}')[0] == 0
  assert len(path.read_text().splitlines()) == 2**10


@pytest.mark.parametrize(
  'values, labels, facts, expected',
  [
    (
      correct_at(0),
      LABELS,
      {'data_fingerprint': 'x'},
      'fingerprint x, not abc',
    ),
    (correct_at(0), LABELS, {'split': 'train'}, 'split train, not test'),
    (correct_at(0), LABELS, {'crops': 144}, 'crops 144, not 1'),
    (correct_at(0)[:7], LABELS[:7], {}, '7 images, not 8'),
    (correct_at(0, num_classes=4), LABELS, {}, '4 classes, not 3'),
    (correct_at(0), LABELS[::-1].copy(), {}, 'labels differ, or their order'),
    (correct_at(0), LABELS, {'model_digest': 'same'}, 'of the same network as'),
  ],
)
def test_files_that_are_not_averaged(
  values, labels, facts, expected, tmp_path, capsys
):
  """One line names both files, and nothing is written."""
  first = write(tmp_path / 'a.npz', correct_at(1), model_digest='same')
  other = {'model_digest': 'other', **facts}
  second = write(tmp_path / 'b.npz', values, labels, **other)
  outputs = [f'--csv={tmp_path / "x.csv"}', f'--plot={tmp_path / "x.png"}']
  code, out, err = run(capsys, first, second, *outputs)
  assert (code, out) == (1, '')
  assert err.startswith(f'error: {second}: ') and err.count('\n') == 1
  assert str(first) in err and expected in err
  assert sorted(tmp_path.iterdir()) == [first, second]


@pytest.mark.parametrize(
  'arguments, expected',
  [
    ((), 'required: FILE'),
    (('a.npz',), 'a.npz: one file. An ensemble needs two or more.'),
    (('a.npz', 'a.npz'), 'a.npz: of the same network as'),
    (('a.npz', 'no.npz'), 'no.npz: cannot be read (No such file'),
    (('a.npz', 'text.npz'), 'text.npz: not a file of probabilities'),
    (('a.npz', 'b.npz', '--csv=no/x.csv'), 'no/x.csv: no folder'),
    (('a.npz', 'b.npz', '--plot=a.npz'), 'a.npz: is one of the files to read'),
    (('a.npz', 'b.npz', '--plot=folder'), 'folder: is a folder. Name a file.'),
  ],
)
def test_mistakes_are_one_line(
  arguments, expected, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  for name in ('a', 'b'):
    write(tmp_path / f'{name}.npz', correct_at(0), model=name)
  (tmp_path / 'text.npz').write_text('text')
  (tmp_path / 'folder').mkdir()
  before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
  code, out, err = run(capsys, *arguments)
  assert (code, out) == (1, '')
  assert expected in err and err.count('\n') == 1
  after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
  assert after == before


def test_imports_no_jax(three):
  code = (
    'import sys; from bn_repro.ensemble import main; '
    'assert main(sys.argv[1:]) == 0; assert "jax" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code, *map(str, three)], check=True)
