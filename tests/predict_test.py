"""The command that classifies images."""

import csv

from matplotlib import image as mpl_image
import numpy as np
from PIL import Image
import pytest

import bn_repro
from bn_repro import predict
from bn_repro.data import datasets

pytestmark = pytest.mark.xdist_group('inference')


@pytest.fixture(scope='module')
def digits(trained_workdir, tmp_path_factory):
  """Paths of PNGs of five test digits, and the model's probabilities."""
  model = bn_repro.load(trained_workdir)
  split = datasets.load(model.file.config.data, 0).splits['test']
  folder = tmp_path_factory.mktemp('digits')
  paths = []
  for number in range(5):
    paths.append(folder / f'{number}.png')
    Image.fromarray(split.images[number, 2:-2, 2:-2, 0]).save(paths[-1])
  return paths, model.predict(split.images[:5, 2:-2, 2:-2])


def run(capsys, *arguments):
  code = predict.main([str(argument) for argument in arguments])
  return code, *capsys.readouterr()


def test_table_csv_and_sheet(trained_workdir, digits, tmp_path, capsys):
  paths, probabilities = digits
  table, sheet = tmp_path / 'out.csv', tmp_path / 'out.png'
  code, said, errors = run(
    capsys,
    f'--model={trained_workdir}',
    '--top=3',
    f'--csv={table}',
    f'--sheet={sheet}',
    *paths,
  )
  assert (code, errors) == (0, '')
  lines = said.splitlines()
  assert 'population statistics; step 20' in lines[0]
  order = np.argsort(-probabilities, axis=-1)[:, :3]
  for line, path, labels, values in zip(
    lines[1:], paths, order, probabilities, strict=False
  ):
    expected = [f'{label} {values[label]:.1%}' for label in labels]
    assert line.split('  ')[:1] == [str(path)]
    assert [part for part in line.split('  ')[1:] if part] == expected
  assert 'images: 5 images in ' in said
  rows = list(csv.DictReader(table.read_text().splitlines()))
  assert len(rows) == 15
  for row, label in zip(rows, order.ravel(), strict=True):
    assert int(row['label']) == label and row['name'] == str(label)
    number = paths.index(type(paths[0])(row['file']))
    value = float(row['probability'])
    np.testing.assert_allclose(value, probabilities[number, label], rtol=1e-3)
  drawn = mpl_image.imread(sheet)
  assert drawn.shape[0] > 300 and drawn.std() > 0.05


def test_ink_on_paper_is_warned_of(trained_workdir, digits, tmp_path, capsys):
  paths, _ = digits
  inverted = tmp_path / 'ink.png'
  Image.fromarray(255 - np.asarray(Image.open(paths[0]))).save(inverted)
  code, _, errors = run(capsys, f'--model={trained_workdir}', *paths, inverted)
  assert code == 0
  assert errors.startswith('warning: 1 of 6 images are mostly bright, ')


def test_undecodable_images_are_named_and_the_others_classified(
  trained_workdir, digits, tmp_path, capsys
):
  paths, _ = digits
  bad = tmp_path / 'bad.png'
  bad.write_bytes(paths[0].read_bytes()[:60])
  code, said, errors = run(
    capsys, f'--model={trained_workdir}', paths[0], bad, tmp_path, paths[1]
  )
  assert code == 1
  assert f'error: {bad}: cannot be decoded' in errors
  assert f'error: {tmp_path}: cannot be decoded: Is a directory' in errors
  assert '2 of 4 images not classified' in errors
  for path in paths[:2]:
    assert f'{path}  ' in said


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--model={tmp}', 'a.png'], 'at its first evaluation'),
    (['--model={tmp}/none', 'a.png'], 'No such file'),
    (['--model={run}'], 'IMAGE'),
    (['a.png'], '--model'),
    (['--model={run}', '--top=0', 'a.png'], 'at least 1'),
    (['--model={run}', '--csv={tmp}/no/a', '{digit}'], 'no folder'),
    (['--model={run}', '--sheet={tmp}/no/a.png', '{digit}'], 'no folder'),
    (['--model={run}', '--sheet={tmp}', '{digit}'], 'is a folder'),
    (['--model={run}', '--csv={digit}', '{digit}'], 'one of the files to read'),
  ],
)
def test_mistakes_are_one_line(
  trained_workdir, digits, tmp_path, capsys, arguments, message
):
  code, _, errors = run(
    capsys,
    *(
      a.format(tmp=tmp_path, run=trained_workdir, digit=digits[0][0])
      for a in arguments
    ),
  )
  assert code == 1
  (line,) = errors.splitlines()
  assert line.startswith('error: ')
  assert message in line
