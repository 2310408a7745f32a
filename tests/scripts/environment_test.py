"""scripts/test.sh: the environment that it makes, and what it runs there."""

import shutil
import tomllib

from packaging.requirements import Requirement
from packaging.version import Version
import pytest
from stand_ins import ROOT, lines, run, stand_in
import yaml

# Makes environments without packages. Records the calls of pip and pytest, and
# what pip is asked to install.
PYTHON = r"""
case "$*" in
  -V) echo "Python ${VERSION:-3.11.7}" ;;
  '-m venv '*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  '-m pip install '*)
    echo "$*" >>"$NOTES/commands"
    cat "${@: -1}" >"$NOTES/requirements" ;;
  '-m pip freeze '*) printf 'jax==9.9\n## Others:\nsix==1.0\n' ;;
  '-m pytest '*) echo "$*" >>"$NOTES/commands" ;;
esac
"""
TOOL = 'echo "${0##*/}" "$@" >>"$NOTES/commands"\n'


@pytest.fixture
def clone(tmp_path, notes, bin_dir, monkeypatch):
  """A folder with test.sh, a Python and linters that record their arguments."""
  folder = tmp_path / 'clone'
  (folder / 'scripts').mkdir(parents=True)
  for name in ('test.sh', 'environment.sh'):
    shutil.copy(ROOT / 'scripts' / name, folder / 'scripts')
  for path in ROOT.glob('requirements*.txt'):
    shutil.copy(path, folder)
  stand_in(bin_dir / 'python3', PYTHON)
  for name in ('ruff', 'mypy'):
    stand_in(bin_dir / name, TOOL)
  monkeypatch.delenv('PYTHON', raising=False)
  return folder


def run_tests(clone, *arguments, **environment):
  return run('bash', 'scripts/test.sh', *arguments, cwd=clone, **environment)


def pins(path, *, own):
  """The lines `name==version` of a file, or its own only."""
  text = path.read_text()
  if own:
    text = text.partition('# Brought by')[0]
  return {line for line in text.splitlines() if '==' in line}


def test_newest_frees_what_the_packages_bring(clone, notes):
  said = run_tests(clone, '--newest', '-k', 'resume', '-x')
  assert said.returncode == 0, said.stderr
  asked = [Requirement(line) for line in lines(notes / 'requirements')]
  files = [ROOT / f'requirements{of}.txt' for of in ('', '-tpu', '-dev')]
  own = set().union(*(pins(file, own=True) for file in files))
  assert {str(r).replace('>=', '==') for r in asked} == own
  assert {s.operator for r in asked for s in r.specifier} == {'>='}
  assert {'jax', 'libtpu', 'pytest'} < {r.name for r in asked}
  assert 'six' not in {r.name for r in asked}
  install, tests = lines(notes / 'commands')
  assert '--upgrade --upgrade-strategy eager -r .venv-newest/' in install
  assert tests.endswith('-m not slow -k resume -x')
  # The versions that are tested, of these packages only.
  assert said.stdout.endswith('Python 3.11.7\njax==9.9\n')
  assert not (clone / '.venv').exists()


def test_pinned_packages_are_installed_again_if_a_pin_changes(clone, notes):
  def installs():
    run_tests(clone).check_returncode()
    return sum(' install ' in line for line in lines(notes / 'commands'))

  assert [installs(), installs()] == [1, 1]
  assert lines(notes / 'requirements') == lines(ROOT / 'requirements-dev.txt')
  with (clone / 'requirements.txt').open('a') as file:
    file.write('six==1.0\n')
  assert installs() == 2


def test_another_python_than_that_of_the_environment_is_refused(
  clone, notes, bin_dir
):
  run_tests(clone).check_returncode()
  stand_in(bin_dir / 'python3.13', 'VERSION=3.13.0\n' + PYTHON)
  said = run_tests(clone, PYTHON='python3.13')
  assert said.returncode == 1
  assert said.stderr == (
    'error: .venv has Python 3.11.7, and PYTHON is Python 3.13.0; '
    'unset PYTHON, or delete .venv\n'
  )
  assert len(lines(notes / 'commands')) == 2  # Nothing more has run.


def test_an_environment_without_pip_is_named(clone, bin_dir):
  """As Debian's Python makes it where python3-venv is missing."""
  broken = 'case "$*" in \'-m pip \'*) exit 1 ;; esac\n'
  stand_in(bin_dir / 'python3', broken + PYTHON)
  for _ in range(2):
    said = run_tests(clone)
    assert said.returncode == 1
    assert said.stderr.startswith('error: .venv has no pip; install')


def test_newest_is_the_first_argument(clone, notes):
  said = run_tests(clone, '--all', '--newest')
  assert said.returncode == 1
  assert said.stderr == 'error: --newest must be the first argument\n'
  assert not any('pytest' in line for line in lines(notes / 'commands'))


def test_pre_commit_runs_the_checks_of_ci(clone, notes):
  run_tests(clone, '--all').check_returncode()
  _, *checks, tests = lines(notes / 'commands')
  assert tests.startswith('-m pytest ') and 'not slow' not in tests
  config = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())
  (repo,) = config['repos']
  assert repo['repo'] == 'local'  # No other versions than in requirements-dev.
  *of_ci, shellcheck = [hook['entry'] for hook in repo['hooks']]
  assert of_ci == [f'.venv/bin/{check}' for check in checks]
  assert shellcheck == '.venv/bin/shellcheck --shell=bash -x'  # In a test.


def test_the_workflow_runs_ci_on_each_python():
  workflow = ROOT / '.github/workflows/tests.yml'
  (job,) = yaml.safe_load(workflow.read_text())['jobs'].values()
  assert job['steps'][-1] == {'run': '.ci/run'}
  versions = job['strategy']['matrix']['python']
  given = '${{ matrix.python }}'
  # scripts/environment.sh takes the Python that is set up.
  assert job['env']['PYTHON'] == f'python{given}'
  assert given in [
    step.get('with', {}).get('python-version') for step in job['steps']
  ]
  with (ROOT / 'pyproject.toml').open('rb') as file:
    oldest = tomllib.load(file)['project']['requires-python']
  assert oldest == f'>={min(versions, key=Version)}'
