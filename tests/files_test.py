"""Paths that users give, in every command, and locks."""

import errno
import fcntl
import importlib
import os
from pathlib import Path
import pwd
import subprocess
import sys

import pytest

from bn_repro import config as config_lib
from bn_repro import files
from bn_repro.errors import UserError
from bn_repro.runtime.workdir import Workdir

REFUSED = {
  '': 'must not be empty',
  ' ': 'must not be empty',
  'gs://': 'mount it',
  'gs://bucket/run': 'mount it',
  's3://b': 'mount it',
  'hdfs://host:9000/x': 'mount it',
  'file:///tmp/x': 'mount it',
  'az+x.y-z://b': 'mount it',
  'a\nb': 'control characters',
  'a\0b': 'control characters',
  '\x1b[2Ja': 'control characters',
  'a\u2028b': 'control characters',
  os.fsdecode(b'a\xffb'): 'must be utf-8 text',
  'gs:/bucket/run': 'mount it (gcsfuse --implicit-dirs BUCKET FOLDER) and',
  'C:/runs': 'mount it and',
  '~no.such.user/x': 'home folder is unknown',
}


@pytest.mark.parametrize('text', REFUSED)
def test_refused_paths(text):
  with pytest.raises(UserError) as caught:
    files.expand('--out', text)
  (problem,) = caught.value.problems
  assert problem.isprintable()
  shown = text.encode('unicode_escape', 'surrogatepass').decode()
  assert problem.startswith(f'--out={shown}: ')
  assert REFUSED[text] in problem


@pytest.mark.parametrize(
  'text, expected',
  [
    ('runs/x', '/here/runs/x'),
    ('runs/x/', '/here/runs/x'),
    ('.', '/here'),
    ('../x', '/here/../x'),
    ('~/x', '/home/me/x'),
    ('~', '/home/me'),
    ('a~b', '/here/a~b'),
    ('lr[0.1]/*?', '/here/lr[0.1]/*?'),
    ('a:b/c d/é', '/here/a:b/c d/é'),
    ('./gs:/b', '/here/gs:/b'),
    ('/x://y', '/x:/y'),
    ('-x', '/here/-x'),
  ],
)
def test_accepted_paths(text, expected, monkeypatch):
  monkeypatch.setattr(os, 'getcwd', lambda: '/here')
  monkeypatch.setenv('HOME', '/home/me')
  assert files.expand('--out', text) == Path(expected)


def test_a_user_without_a_name_and_a_home(monkeypatch):
  """As in a container that runs with any user id."""

  def unknown(uid):
    raise KeyError(uid)

  monkeypatch.delenv('HOME')
  monkeypatch.setattr(pwd, 'getpwuid', unknown)
  with pytest.raises(UserError, match='--out=~/x: the home folder is unknown'):
    files.expand('--out', '~/x')
  assert files.expand('--out', '/x') == Path('/x')
  with pytest.raises(UserError, match=r'config.data.name=mnist: .*~/tensor'):
    importlib.import_module('bn_repro.data.datasets').check(
      config_lib.load('bn_mnist:mini', ['data.name=mnist'])
    )


def test_a_current_folder_that_is_gone(tmp_path, monkeypatch):
  (tmp_path / 'gone').mkdir()
  monkeypatch.chdir(tmp_path / 'gone')
  (tmp_path / 'gone').rmdir()
  with pytest.raises(UserError, match='current folder no longer exists'):
    files.expand('--out', 'x')


@pytest.mark.parametrize('folder', [b'/caf\xc3\xa9 \xff', b'/a\nb'])
def test_a_current_folder_without_a_printable_name(folder, monkeypatch):
  monkeypatch.setattr(os, 'getcwd', lambda: os.fsdecode(folder))
  with pytest.raises(UserError, match='must be utf-8 text|control characters'):
    files.expand('--out', 'x')
  assert files.expand('--out', '/x') == Path('/x')


# The flags of each command that name paths, with its other arguments.
_CONFIG = '--config=mnist:mini'
_LAUNCH = ('slurm', '--name=x', '--workdir=/runs/x', '--config=mnist')
COMMANDS = {
  'bn_repro.main': ([_CONFIG, '--workdir=w'], '--config --workdir'),
  'bn_repro.ensemble': (['a.npz', 'b.npz'], '--csv --plot'),
  'bn_repro.evaluate': (
    ['--workdir=w'],
    '--workdir --data_dir --save_probabilities',
  ),
  'bn_repro.examples': ([_CONFIG], '--config --workdir --sheet'),
  'bn_repro.lab.__main__': (['gradients', '--workdir=w'], '--workdir'),
  'bn_repro.overview': ([_CONFIG], '--config'),
  'bn_repro.report.__main__': (['--runs=w', '--out=o'], '--runs --out'),
  'bn_repro.sweep.__main__': (
    ['--sweep=batch_size', '--workdir=w'],
    '--sweep --config --workdir',
  ),
  'compile_check': ([_CONFIG, '--platform=cpu'], '--config --json'),
  'launch': (_LAUNCH, '--config --sweep --workdir --out'),
  'make_stand_in': (['--out=o'], '--out'),
  'prepare_imagenet': (
    ['--manual_dir=a', '--data_dir=d'],
    '--manual_dir --data_dir',
  ),
  'study': (['--out=o'], '--out'),
}


# What may also be in a bucket.
IN_BUCKET = (
  ('bn_repro.main', '--workdir'),
  ('bn_repro.evaluate', '--workdir'),
  ('bn_repro.report.__main__', '--runs'),
  ('bn_repro.sweep.__main__', '--workdir'),
  ('launch', '--workdir'),
)


@pytest.mark.parametrize(
  'command, flag',
  [
    (command, flag)
    for command, (_, flags) in COMMANDS.items()
    for flag in flags.split()
  ],
)
def test_every_command_refuses_them(
  command, flag, tmp_path, monkeypatch, capsys
):
  """In one line, with exit code 1 and nothing written."""
  monkeypatch.syspath_prepend('scripts')
  main = importlib.import_module(command).main
  monkeypatch.chdir(tmp_path)
  arguments = [*COMMANDS[command][0], flag]
  # Their handlers of signals would stay in this process.
  monkeypatch.setattr('signal.signal', lambda *_: None)
  in_bucket = (command, flag) in IN_BUCKET
  bucket = 'gs://' if in_bucket else 'gs://bucket/run'
  for text in ('', bucket, 'a\nb', '~no.such.user/x'):
    arguments[-1] = f'{flag}={text}'
    monkeypatch.setattr(sys, 'argv', [command, *arguments])
    assert main() == 1
    error = capsys.readouterr().err
    assert error.startswith(f'error: {flag}=')
    is_place = in_bucket and text == bucket
    assert ('gs://BUCKET/NAME' if is_place else REFUSED[text]) in error
    assert error.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('field', ['init_from', 'data.data_dir'])
def test_fields_refuse_them(field):
  for text in ('s3://b', 'a\tb', ' '):
    with pytest.raises(UserError, match=REFUSED.get(text, 'control')):
      config_lib.load('mnist:mini', [f'{field}={text}'])
  # The default.
  assert config_lib.load('mnist:mini', [f'{field}='])


# Locks.


@pytest.mark.parametrize(
  'number',
  [
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EACCES,
    errno.EIO,
    errno.EROFS,
    errno.EINVAL,
  ],
)
def test_a_lock_that_fails_is_not_taken_for_use(number, tmp_path, monkeypatch):
  def fail(file, operation):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, 'flock', fail)
  with pytest.raises(UserError, match=os.strerror(number)) as caught:
    Workdir(tmp_path / 'run').claim()
  assert 'in use' not in str(caught.value)
  assert list(tmp_path.iterdir()) == []


def test_locks(tmp_path):
  """Also those of the program that locks for shell scripts."""
  path = tmp_path / 'lock'
  path.touch()
  with path.open() as first, path.open() as second:
    assert files.lock(first, shared=True)
    assert files.lock(second, shared=True)
    assert not files.lock(first)
  with path.open() as first, path.open() as second:
    assert files.lock(first)
    assert not files.lock(second)
    taken = subprocess.run(['flock', '--nonblock', path, 'true'], check=False)
    assert taken.returncode == 1
    first.close()
    assert files.lock(second)
