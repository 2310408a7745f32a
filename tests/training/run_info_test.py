"""The revision of the code: its own, or a word on why it is unknown."""

import os
import shutil
import subprocess

import pytest

from bn_repro import config as config_lib
from bn_repro.training import run_info

COMMIT = ('-c', 'user.name=N', '-c', 'user.email=e', 'commit', '--quiet')


def git(folder, *arguments):
  result = subprocess.run(
    ['git', '-C', folder, *arguments],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  return result.stdout.strip()


def repository(folder):
  """Makes a repository with a tagged commit; returns the revision."""
  (folder / 'bn_repro').mkdir(parents=True)
  git(folder, 'init', '--quiet')
  (folder / 'bn_repro' / 'code.py').write_text('1\n')
  (folder / 'results').mkdir()
  (folder / 'results' / 'run.json').write_text('1\n')
  git(folder, 'add', '.')
  git(folder, *COMMIT, '--message=m')
  git(folder, 'tag', 'v1')
  return git(folder, 'rev-parse', 'HEAD')


def revision(root, monkeypatch):
  """Returns the revision and the warnings."""
  monkeypatch.setattr(config_lib, 'ROOT', root)
  said = []
  return run_info.git_revision(said.append), said


def test_revision(tmp_path, monkeypatch):
  root = tmp_path / 'a folder'
  head = repository(root)
  # Set by git for its hooks, and of another repository.
  monkeypatch.setenv('GIT_INDEX_FILE', str(tmp_path / 'none'))
  assert revision(root, monkeypatch) == (head, [])
  # One file that has been left there says nothing about the others.
  (root / 'REVISION').write_text('0123\n')
  assert revision(root, monkeypatch) == (head, [])
  # A study that publishes its runs trains the next ones with the same code.
  (root / 'results' / 'run.json').write_text('changed\n')
  assert revision(root, monkeypatch) == (head, [])
  (root / 'bn_repro' / 'code.py').write_text('2\n')
  assert revision(root, monkeypatch) == (f'{head}-dirty', [])


def test_revision_of_a_worktree(tmp_path, monkeypatch):
  head = repository(tmp_path / 'main')
  git(tmp_path / 'main', 'worktree', 'add', '--quiet', tmp_path / 'tree')
  assert revision(tmp_path / 'tree', monkeypatch) == (head, [])


def test_revision_of_another_owner(tmp_path, monkeypatch):
  """Git by itself refuses to read it."""
  head = repository(tmp_path / 'root')
  program = tmp_path / 'bin' / 'git'
  program.parent.mkdir()
  program.write_text(
    '#!/bin/sh\nexport GIT_TEST_ASSUME_DIFFERENT_OWNER=1\n'
    f'exec {shutil.which("git")} "$@"\n'
  )
  program.chmod(0o755)
  monkeypatch.setenv('PATH', f'{program.parent}:{os.environ["PATH"]}')
  with pytest.raises(AssertionError, match='dubious ownership'):
    git(tmp_path / 'root', 'describe', '--always')
  assert revision(tmp_path / 'root', monkeypatch) == (head, [])


@pytest.mark.parametrize('ignored', [False, True])
def test_revision_of_a_repository_that_the_code_was_copied_into(
  ignored, tmp_path, monkeypatch
):
  root = tmp_path / 'root'
  repository(root)
  git(root, 'rm', '--quiet', '-r', '--cached', 'bn_repro')
  (root / '.gitignore').write_text('bn_repro\n' if ignored else '')
  git(root, 'add', '.gitignore')
  git(root, *COMMIT, '--message=m')
  found, (warning,) = revision(root, monkeypatch)
  assert found == ''
  assert 'does not track bn_repro' in warning


@pytest.mark.parametrize('form', ['inside', 'environment', 'broken'])
def test_revision_of_another_repository_is_not_taken(
  form, tmp_path, monkeypatch
):
  outside = tmp_path / 'outside'
  repository(outside)
  root = tmp_path / 'copy' if form == 'environment' else outside / 'copy'
  root.mkdir()
  if form == 'environment':
    monkeypatch.setenv('GIT_DIR', str(outside / '.git'))
    monkeypatch.setenv('GIT_WORK_TREE', str(outside))
  if form == 'broken':
    (root / '.git').mkdir()
  found, (warning,) = revision(root, monkeypatch)
  assert found == ''
  assert warning.startswith('warning: the git revision of the code is unknown')
  assert 'not a git repository' in warning
  # A copy that was sent with its revision has it.
  (root / 'REVISION').write_text('0123-dirty\n')
  assert revision(root, monkeypatch) == ('0123-dirty', [])


def test_revision_without_git(tmp_path, monkeypatch):
  repository(tmp_path / 'root')
  monkeypatch.setenv('PATH', str(tmp_path))
  found, (warning,) = revision(tmp_path / 'root', monkeypatch)
  assert found == ''
  assert "'git'" in warning


def test_no_revision_of_an_installed_package(monkeypatch):
  assert revision(None, monkeypatch) == ('', [])
