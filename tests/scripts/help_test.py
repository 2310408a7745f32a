"""The help of every script: no set-up, nothing written, exit code 0."""

import shutil
import sys

import pytest
from stand_ins import ROOT, run, stand_in

SCRIPTS = {
  str(path.relative_to(ROOT))
  for suffix in ('py', 'sh')
  for path in (ROOT / 'scripts').rglob(f'*.{suffix}')
  # The modules of a command are not commands.
  if suffix == 'sh' or '\nif __name__ == ' in path.read_text()
} - {'scripts/environment.sh'}
# They take words, and `--help` anywhere among them asks for help.
WITH_WORDS = {
  'scripts/launch/host.sh': ('train', '--help'),
  'scripts/launch/pack.sh': ('/no/folder', '-h'),
  'scripts/launch/slice.sh': ('create', '--help'),
  'scripts/prepare_imagenet.sh': ('--data_dir=d', '--manual_dir', 'm', '-h'),
  'scripts/prepare_imagenet.py': ('--data_dir=d', '-h'),
  'scripts/quickstart.sh': ('now', '--help'),
  'scripts/study.py': ('fig1', '--help'),
  'scripts/test.sh': ('--all', '-k', 'resume', '--help'),
}


@pytest.fixture(scope='module')
def copied(tmp_path_factory):
  """The scripts and the package, without environments."""
  folder = tmp_path_factory.mktemp('copied')
  ignored = shutil.ignore_patterns('__pycache__')
  for name in ('scripts', 'bn_repro', 'configs', 'results/compile_check'):
    shutil.copytree(ROOT / name, folder / name, ignore=ignored)
  return folder


def contents(folder):
  return {path: path.stat().st_mtime_ns for path in folder.rglob('*')}


@pytest.mark.parametrize(
  'script, words',
  [
    *((script, ('--help',)) for script in sorted(SCRIPTS)),
    *((script, ('-h',)) for script in sorted(SCRIPTS) if '.sh' in script),
    *WITH_WORDS.items(),
  ],
)
def test_help(script, words, copied, bin_dir):
  # Shell scripts find a Python without packages.
  stand_in(bin_dir / 'python3', f'exec {sys.executable} -S "$@"\n')
  program = 'bash' if script.endswith('.sh') else sys.executable
  before = contents(copied)
  said = run(program, script, *words, cwd=copied, PYTHONDONTWRITEBYTECODE='1')
  assert said.returncode == 0, said.stderr
  assert said.stderr == ''
  assert len(said.stdout.splitlines()) > 2
  assert 'setsid' not in said.stdout
  assert contents(copied) == before
