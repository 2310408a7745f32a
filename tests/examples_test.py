"""The list and the contact sheet show what training takes."""

from matplotlib import image as mpl_image
import numpy as np
import pytest
import written_imagenet

from bn_repro import config as config_lib
from bn_repro import examples
from bn_repro.data import datasets, imagenet_metadata, input_pipeline
from bn_repro.report import figures

MINI = 'configs/bn_x5.py:mini'


def run(capsys, *arguments):
  code = examples.main(arguments)
  captured = capsys.readouterr()
  return code, captured.out.splitlines(), captured.err.splitlines()


def stream(config, step):
  train = datasets.check(config).splits['train']
  order = input_pipeline.create_order(config, len(train))
  return next(
    input_pipeline.train_batches(
      train, order, config.batch_size, step, step + 1
    )
  )


def test_lists_what_a_step_takes(capsys):
  config = config_lib.load(MINI)
  train = datasets.check(config).splits['train']
  # An epoch of 3,500 images ends in the step that begins at 3,488.
  for step in (0, 108, 109, 110, 10**9):
    code, (header, *lines), _ = run(
      capsys, f'--config={MINI}', f'--step={step}'
    )
    assert code == 0
    assert header.split()[:4] == ['epoch', 'position', 'example', 'label']
    rows = np.array([[int(x) for x in line.split()[:4]] for line in lines])
    position = 3500 * rows[:, 0] + rows[:, 1]
    np.testing.assert_array_equal(
      position, np.arange(32 * step, 32 * step + 32)
    )
    batch = stream(config, step)
    np.testing.assert_array_equal(train.labels[rows[:, 2]], batch['label'])
    np.testing.assert_array_equal(rows[:, 3], batch['label'])
    np.testing.assert_array_equal(train.images[rows[:, 2]], batch['image'])


def test_list_and_sheet_of_a_step(tmp_path, capsys, monkeypatch):
  drawn = []
  draw = figures.contact_sheet

  def record(rows, path):
    drawn.extend(rows)
    draw(rows, path)

  monkeypatch.setattr(figures, 'contact_sheet', record)
  written_imagenet.write(tmp_path, written_imagenet.examples())
  overrides = (
    f'data.data_dir={tmp_path}',
    'data.name=imagenet_stand_in',
    'data.num_shards=4',
    'data.distortion=none',
    'batch_size=8',
  )
  path = tmp_path / 'sheet.png'
  code, (_, *lines, last), _ = run(
    capsys,
    '--config=configs/bn_x5.py',
    *(f'--config.{override}' for override in overrides),
    '--step=3',
    f'--sheet={path}',
  )
  assert code == 0 and len(lines) == 8 and str(path) in last
  synsets = imagenet_metadata.synsets()
  class_names = imagenet_metadata.class_names()
  for line in lines:
    *_, file = line.split()
    label = synsets.index(file.split('_')[0])
    assert f'  {label}  {class_names[label]}  ' in line
  assert mpl_image.imread(path).shape[1] > 800
  config = config_lib.load('configs/bn_x5.py', overrides)
  (_, images, captions), (_, evaluated, eval_captions) = drawn
  batch = stream(config, 3)
  np.testing.assert_array_equal(images, batch['image'])
  assert captions == [class_names[label] for label in batch['label']]
  validation = datasets.check(config).splits['validation']
  expected = validation.evaluation_batch(np.arange(10))
  np.testing.assert_array_equal(evaluated, expected['image'])
  assert eval_captions == [class_names[label] for label in expected['label']]


def test_sheet_of_gray_digits_of_a_run(tmp_path, capsys):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  config = config_lib.load(MINI)
  (workdir / 'config.json').write_text(config_lib.to_json(config))
  path = tmp_path / 'digits.png'
  code, lines, _ = run(
    capsys, f'--workdir={workdir}', '--step=7', f'--sheet={path}'
  )
  assert code == 0 and len(lines) == 34
  assert mpl_image.imread(path).shape[1] > 800


@pytest.mark.parametrize(
  'arguments, expected',
  [
    ((), '--config or --workdir'),
    ((f'--config={MINI}', '--workdir=/no'), '--config or --workdir'),
    (('--workdir=/no',), 'contains no run'),
    (('--workdir=/no', '--config.seed=1'), 'goes with --config'),
    ((f'--config={MINI}', '--step=-1'), '--step=-1'),
    ((f'--config={MINI}', '--step=x'), '--step'),
    ((f'--config={MINI}', '--sheet=/no/where.png'), '/no/where.png'),
    ((f'--config={MINI}', '--sheet=/tmp/sheet.what'), 'sheet.what'),
  ],
)
def test_mistakes(arguments, expected, capsys):
  code, _, errors = run(capsys, *arguments)
  (line,) = errors
  assert code == 1 and line.startswith('error: ') and expected in line
