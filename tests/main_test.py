"""The command: its help, and its errors, which come before JAX is imported."""

import pytest
import support
from support import run_without_jax as run

from bn_repro import main
from bn_repro.runtime import processes, workdir
from bn_repro.training import train

ROOT = support.ROOT
CONFIG = '--config=configs/bn_x5.py:mini'


def assert_one_line(result, expected):
  assert result.code == 1, expected
  assert result.err.startswith('error: ')
  assert result.err.count('\n') == 1
  assert expected in result.err


def test_help():
  (result,) = run(['--help'])
  assert result.code == 0
  for text in ('bn_x5', 'mini', '75', 'examples', 'configs/inception.py'):
    assert text in result.out


def test_mistakes_in_a_config(tmp_path):
  cases = {
    'optim.lerning_rate=1': "Did you mean 'optim.learning_rate'",
    'batch_size=many': "'many' is not a whole number",
    'optim.momentum=1.5': 'must be at least 0 and below 1',
    'model.stem=wide': 'must be one of separable, plain',
    'batch_size=5000': 'larger than the 3500 training images',
    'model.width=0.01': 'without channels',
    'data.image_size=16': 'too small',
    'data.name=mnist': 'data.data_dir=FOLDER',
    'eval_split=validation --config.data.holdout=0': 'config.data.holdout',
    'total_epochs=3': 'set one of them',
    'data.num_shards=9000': 'num_shards=9000: larger than the 3500',
    'optim.learning_rate=nan': 'must be a finite number',
  }
  workdir = f'--workdir={tmp_path / "run"}'
  commands = [
    [CONFIG, workdir, *f'--config.{override}'.split()] for override in cases
  ]
  for result, expected in zip(run(*commands), cases.values(), strict=True):
    assert_one_line(result, expected)
  assert not (tmp_path / 'run').exists()


def test_mistakes_on_the_command_line(tmp_path):
  damaged = tmp_path / 'config.json'
  damaged.write_text('{')
  workdir = '--workdir=W'
  cases = [
    (['--config=configs/bn_x6.py', workdir], 'configs/bn_x5.py'),
    (['--config=configs/bn_x5.py:tiny', workdir], "no mode 'tiny'"),
    (['--config=configs/bn_x5.py', workdir], 'imagenet2012'),
    ([CONFIG], '--workdir'),
    ([workdir], '--config'),
    ([CONFIG, workdir, '--speed=9'], '--speed=9'),
    ([CONFIG, '--workdir=README.md'], 'is a file'),
    ([CONFIG, '--workdir=README.md/run'], 'is a file'),
    ([CONFIG, f'--workdir={tmp_path}'], 'config.json: is not valid JSON'),
    ([CONFIG, workdir, '--process_id=0'], 'all three or none'),
  ]
  results = run(*(arguments for arguments, _ in cases))
  for result, (_, expected) in zip(results, cases, strict=True):
    assert_one_line(result, expected)
  assert not (ROOT / 'W').exists()
  assert damaged.read_text() == '{'


def test_all_problems_at_once(tmp_path):
  mistakes = ('sead=1', 'batch_size', 'model.width=0')
  first, second, third = (f'--config.{mistake}' for mistake in mistakes)
  workdir = f'--workdir={tmp_path / "run"}'
  (result,) = run([CONFIG, workdir, first, second, 'x', third])
  assert result.code == 1
  for text in ("'seed'", 'whole number', 'channels'):
    assert text in result.err
  assert result.err.count('\n') == 3


def test_broken_config_files(tmp_path):
  dictionary = 'from ml_collections import ConfigDict\ndef get_config(mode):\n'
  cases = {
    'def get_config(': 'SyntaxError',
    'import nothing_there': 'ModuleNotFoundError',
    'x = 1': 'no get_config(mode)',
    'def get_config(mode):\n  return 3': 'must return a ConfigDict',
    f'{dictionary}  return ConfigDict({{"seed": 1}})': 'the field is missing',
  }
  commands = []
  for number, text in enumerate(cases):
    (tmp_path / f'own{number}.py').write_text(text)
    commands.append(
      [f'--config={tmp_path}/own{number}.py', f'--workdir={tmp_path / "run"}']
    )
  for result, expected in zip(run(*commands), cases.values(), strict=True):
    assert result.code == 1
    assert expected in result.err
    assert 'Traceback' not in result.err
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('place', ['at the start', 'in training'])
def test_a_process_that_is_lost_is_no_failure(
  place, tmp_path, monkeypatch, capsys
):
  """Wherever a collective notices it: the same command resumes."""

  def lost(*arguments, **options):
    # As for a process that has connected.
    monkeypatch.setattr(processes, 'count', lambda: 2)
    raise RuntimeError('Gloo AllGather failed: Connection closed by peer\nmore')

  monkeypatch.setattr('signal.signal', lambda *_: None)
  if place == 'at the start':
    monkeypatch.setattr(processes, 'run_on_all', lost)
  else:
    # The lock would stay until the end of this process.
    monkeypatch.setattr(workdir.Workdir, 'claim', lambda workdir: None)
    monkeypatch.setattr(train, 'train_and_evaluate', lost)
  code = main.main([CONFIG, f'--workdir={tmp_path}'])
  assert code == 75
  assert capsys.readouterr().err == (
    'error: lost another process: Gloo AllGather failed: Connection closed by '
    'peer\n'
  )
