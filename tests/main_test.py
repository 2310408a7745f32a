"""The command: its help, and what each mistake gets before JAX is imported."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIG = '--config=configs/bn_x5.py:mini'

# Runs `main` and says, last on standard output, whether JAX was imported.
SCRIPT = """
import sys
from bn_repro import main
try:
  code = main.main(sys.argv[1:])
except SystemExit as end:
  code = end.code
print('jax' in sys.modules, flush=True)
sys.exit(code)
"""


def run(*arguments):
  result = subprocess.run(
    [sys.executable, '-c', SCRIPT, *arguments],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert result.stdout.splitlines()[-1] == 'False'
  return result


def test_help():
  result = run('--help')
  assert result.returncode == 0
  for text in ('bn_x5', 'mini', '75', 'examples', 'configs/inception.py'):
    assert text in result.stdout


@pytest.mark.parametrize(
  'override, expected',
  [
    ('optim.lerning_rate=1', "Did you mean 'optim.learning_rate'"),
    ('batch_size=many', "'many' is not a whole number"),
    ('optim.momentum=1.5', 'must be at least 0 and below 1'),
    ('model.stem=wide', 'must be one of separable, plain'),
    ('batch_size=5000', 'larger than the 4000 training images'),
    ('model.width=0.01', 'without channels'),
    ('data.image_size=16', 'too small'),
    ('data.name=mnist', 'data.data_dir=FOLDER'),
    ('eval_split=validation --config.data.holdout=0', 'config.data.holdout'),
    ('total_epochs=3', 'set one of them'),
    ('data.num_shards=9000', 'more than the 4000'),
    ('optim.learning_rate=nan', 'must be a finite number'),
  ],
)
def test_mistakes_in_a_config(override, expected, tmp_path):
  arguments = f'--config.{override}'.split()
  result = run(CONFIG, f'--workdir={tmp_path / "run"}', *arguments)
  assert_one_line(result, expected)
  assert not (tmp_path / 'run').exists()


def assert_one_line(result, expected):
  assert result.returncode == 1
  assert result.stderr.startswith('error: ')
  assert result.stderr.count('\n') == 1
  assert expected in result.stderr


@pytest.mark.parametrize(
  'arguments, expected',
  [
    (('--config=configs/bn_x6.py', '--workdir=W'), 'configs/bn_x5.py'),
    (('--config=configs/bn_x5.py:tiny', '--workdir=W'), "no mode 'tiny'"),
    (('--config=configs/bn_x5.py', '--workdir=W'), 'imagenet2012'),
    ((CONFIG,), '--workdir'),
    (('--workdir=W',), '--config'),
    ((CONFIG, '--workdir=W', '--speed=9'), '--speed=9'),
    ((CONFIG, '--workdir=README.md'), 'is a file'),
    ((CONFIG, '--workdir=README.md/run'), 'is a file'),
    ((CONFIG, '--workdir=/proc/no/where'), 'cannot be written'),
  ],
)
def test_mistakes_on_the_command_line(arguments, expected):
  assert_one_line(run(*arguments), expected)
  assert not (ROOT / 'W').exists()


def test_all_problems_at_once(tmp_path):
  result = run(
    CONFIG,
    f'--workdir={tmp_path / "run"}',
    '--config.sead=1',
    '--config.batch_size',
    'x',
    '--config.model.width=0',
  )
  assert result.returncode == 1
  for text in ("'seed'", 'whole number', 'channels'):
    assert text in result.stderr
  assert result.stderr.count('\n') == 3


@pytest.mark.parametrize(
  'text, expected',
  [
    ('def get_config(', 'SyntaxError'),
    ('import nothing_there', 'ModuleNotFoundError'),
    ('x = 1', 'no get_config(mode)'),
    ('def get_config(mode):\n  return 3', 'must return a ConfigDict'),
    (
      'from ml_collections import ConfigDict\n'
      'def get_config(mode):\n  return ConfigDict({"seed": 1})',
      'the field is missing',
    ),
  ],
)
def test_broken_config_files(text, expected, tmp_path):
  path = tmp_path / 'own.py'
  path.write_text(text)
  result = run(f'--config={path}', f'--workdir={tmp_path / "run"}')
  assert result.returncode == 1
  assert expected in result.stderr
  assert 'Traceback' not in result.stderr
  assert not (tmp_path / 'run').exists()


def test_damaged_workdir(tmp_path):
  (tmp_path / 'config.json').write_text('{')
  assert_one_line(run(CONFIG, f'--workdir={tmp_path}'), 'cannot be read')
