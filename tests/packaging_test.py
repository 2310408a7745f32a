"""A source distribution, its wheel, installed and used in another folder."""

import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

import pytest
import yaml

import bn_repro
from bn_repro import numerics

ROOT = Path(__file__).resolve().parent.parent
# As `python -m build` does, in the environment as it is.
BUILD_SDIST = """
import sys
from setuptools import build_meta
build_meta.build_sdist(sys.argv[1])
"""


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """A folder that holds what `pip install .` installs of this repository."""
  folder = tmp_path_factory.mktemp('packages')
  source = folder / 'source'
  for name in ('bn_repro', 'configs'):
    shutil.copytree(
      ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__')
    )
  for name in ('pyproject.toml', 'requirements.txt', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  subprocess.run(
    [sys.executable, '-c', BUILD_SDIST, folder],
    cwd=source,
    stdout=subprocess.DEVNULL,
    check=True,
  )
  (sdist,) = folder.glob('*.tar.gz')
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '--quiet']
  build = ['wheel', '--no-deps', '--no-build-isolation', f'-w{folder}']
  subprocess.run([*pip, *build, sdist], check=True)
  (wheel,) = folder.glob('*.whl')
  subprocess.run(
    [*pip, 'install', '--no-deps', '--no-index', f'-t{folder / "site"}', wheel],
    check=True,
  )
  return folder / 'site'


def run(site, folder, *arguments):
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=folder,
    env={**os.environ, 'PYTHONPATH': str(site), 'PYTHONSAFEPATH': ''},
    capture_output=True,
    text=True,
    check=False,
  )


def test_every_module_is_installed_and_nothing_beside_the_package(site):
  modules = {
    *(path.relative_to(ROOT) for path in (ROOT / 'bn_repro').rglob('*.py')),
    *(
      'bn_repro' / path.relative_to(ROOT)
      for path in (ROOT / 'configs').rglob('*.py')
    ),
  }
  assert {path.relative_to(site) for path in site.rglob('*.py')} == modules
  top = {path.name for path in site.iterdir() if path.suffix != '.dist-info'}
  assert top == {'bn_repro'}
  version = bn_repro.__version__
  assert (site / f'bn_repro-{version}.dist-info').is_dir()


def test_citation_and_changelog_have_the_version_and_its_date():
  citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert citation['version'] == bn_repro.__version__
  heading = re.compile(r'^## \[(\d.*)\] - (\S+)$', re.MULTILINE)
  newest = heading.search((ROOT / 'CHANGELOG.md').read_text()).groups()
  assert newest == (bn_repro.__version__, str(citation['date-released']))


def test_the_digest_is_that_of_the_checkout(site, tmp_path):
  code = 'from bn_repro import numerics; print(numerics.digest())'
  result = run(site, tmp_path, '-c', code)
  assert result.stdout.strip() == numerics.digest(), result.stderr


LOAD = """
import configs
from bn_repro import config
for name in ('bn_x5:mini', 'own.py:mini', 'configs/mine.py'):
  print(config.load(name).bn.enabled)
print(config.find_file('--sweep', 'section_421', config.CONFIGS / 'sweeps'))
# No checkout, whose revision a run could record.
print(config.ROOT)
print(configs.__file__)
"""


def test_configs_of_the_user_do_not_shadow_the_shipped_ones(site, tmp_path):
  own = tmp_path / 'configs'
  own.mkdir()
  (own / '__init__.py').write_text('')
  (own / 'bn_baseline.py').write_text('raise RuntimeError("shadows ours")')
  text = 'from configs.bn_x5 import get_config'
  (own / 'mine.py').write_text(text)
  (tmp_path / 'own.py').write_text(text)
  result = run(site, tmp_path, '-c', LOAD)
  assert result.stderr == ''
  # The user's own package is unharmed.
  assert result.stdout.split() == [
    *('True', 'True', 'True'),
    f'{site}/bn_repro/configs/sweeps/section_421.py',
    'None',
    f'{own}/__init__.py',
  ]


def test_commands_find_configs_by_name_in_any_folder(site, tmp_path):
  main = ('-m', 'bn_repro.main', f'--workdir={tmp_path / "w"}')
  result = run(site, tmp_path, '-m', 'bn_repro.main', '--help')
  assert result.returncode == 0 and '--config' in result.stdout
  # It stops at the first thing that a shipped config cannot provide.
  result = run(
    site, tmp_path, *main, '--config=bn_mnist', '--config.data.data_dir=/no'
  )
  assert result.returncode == 1
  assert result.stderr.startswith('error: config.data.name=mnist: ')
  result = run(site, tmp_path, *main, '--config=bn_x6:mini')
  assert result.returncode == 1 and result.stderr.count('\n') == 1
  assert 'bn_baseline, bn_mnist, bn_x30, bn_x5' in result.stderr
