"""README.md, CONTRIBUTING.md and docs/: links, commands and code."""

import argparse
import importlib
import itertools
from pathlib import Path
import re
import shlex
import subprocess
import sys

import markdown_it
from pip._internal.commands import create_command
import pytest

from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.lab import __main__ as lab
from bn_repro.sweep import grid

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / 'README.md'
DOCUMENTS = (
  README,
  ROOT / 'CONTRIBUTING.md',
  *sorted((ROOT / 'docs').glob('**/*.md')),
  ROOT / 'results/gpu/README.md',
)
# Links alone are checked.
PAGES = (
  ROOT / 'CHANGELOG.md',
  ROOT / 'SECURITY.md',
  *sorted((ROOT / 'results').glob('*/*.md')),
)
# Programs that are not ours; the tests of launch.py have a stand-in for gcloud.
OTHERS = ('gcloud', 'source', 'pytest')


def parsed(path):
  """The tokens of a document, those within paragraphs as well."""
  tokens = markdown_it.MarkdownIt().enable('table').parse(path.read_text())
  children = (child for token in tokens for child in token.children or ())
  return [*tokens, *children]


def blocks(path, language):
  """The code blocks in a language; '' has commands."""
  return [
    token.content
    for token in parsed(path)
    if token.type == 'fence' and token.info == language
  ]


def commands(path):
  """The commands of a document: lines of blocks, and code in sentences."""
  joined = (block.replace('\\\n', ' ') for block in blocks(path, ''))
  lines = [line for block in joined for line in block.splitlines() if line]
  code = [t.content for t in parsed(path) if t.type == 'code_inline']
  return lines + [
    text
    for text in code
    if re.match(r'([A-Z_]+=\S+ )*(python|bash) ', text) and '...' not in text
  ]


# Made on purpose in docs/tour.md, which shows the error.
MISTAKE = '--config.bn.momentm=2'


def every_command():
  return [
    pytest.param(command, id=f'{path.name}-{number}')
    for path in DOCUMENTS
    for number, command in enumerate(commands(path))
    if MISTAKE not in command
  ]


class Parsed(Exception):
  """A command has accepted its arguments."""


@pytest.fixture
def accepts(monkeypatch):
  """A function that gives a command its arguments and nothing to do."""
  parse_args = argparse.ArgumentParser.parse_args

  def parse(self, *args, **kwargs):
    raise Parsed(parse_args(self, *args, **kwargs))

  def accepts(module, arguments):
    with monkeypatch.context() as patch:
      patch.setattr(argparse.ArgumentParser, 'parse_args', parse)
      patch.setattr(sys, 'argv', [module, *arguments])
      try:
        importlib.import_module(module).main()
      except Parsed:
        return True
      except SystemExit as end:  # --help.
        return end.code == 0
    return False

  return accepts


def overrides_of(arguments):
  """The assignments of `--config.FIELD=VALUE`."""
  return [
    argument.removeprefix('--config.')
    for argument in arguments
    if argument.startswith('--config.')
  ]


def check_config(arguments):
  """The config or sweep that a command names, with its overrides, loads."""
  values = dict(a.split('=', 1) for a in arguments if '=' in a)
  overrides = overrides_of(arguments)
  if '--sweep' in values:
    grid.load(values['--sweep'], [], values.get('--config', ''), overrides)
  else:
    # Those of `evaluate` change the config of a run.
    config_lib.load(values.get('--config', 'bn_x5:mini'), overrides)


def check_pip(name, *arguments):
  """Options that pip knows, and files that exist."""
  options, packages = create_command(name).parse_args([*arguments])
  assert packages or options.requirements
  assert all((ROOT / path).is_file() for path in options.requirements)


def test_languages_of_blocks():
  """Commands, which are checked below, code, and what is neither."""
  for path in DOCUMENTS:
    for token in parsed(path):
      assert token.type != 'code_block', path
      if token.type == 'fence':
        assert token.info in ('', 'python', 'text', 'bibtex'), path


@pytest.mark.parametrize('command', every_command())
def test_command(command, accepts):
  """Flags are accepted, and configs and scripts exist."""
  loop = re.fullmatch(r'for .*; do (.*); done', command)
  words = shlex.split(loop[1] if loop else command, comments=True)
  while words and re.fullmatch(r'[A-Z_]+=.*', words[0]):
    words = words[1:]
  if not words:
    return
  program, *arguments = words
  if program in OTHERS:
    return
  if arguments[:2] == ['-m', 'pip']:
    program, *arguments = arguments[1:]
  if program == 'pip':
    check_pip(*arguments)
    return
  if program == 'bash':
    script = arguments.pop(0)
    if script.startswith('launch/'):  # Written by launch.py.
      return
    assert (ROOT / script).is_file()
    if 'prepare_imagenet' not in script:
      said = subprocess.run(
        ['bash', script, '--help'], capture_output=True, text=True, check=True
      )
      for flag in (a for a in arguments if a.startswith('--')):
        assert flag in said.stdout
      return
    module = 'prepare_imagenet'
  else:
    assert program == 'python'
    if arguments[0] == '-m':
      module = arguments[1]
      arguments = arguments[2:]
      if module in OTHERS:
        return
      path = ROOT / module.replace('.', '/')
      if path.is_dir():
        module += '.__main__'
    else:
      assert (ROOT / arguments[0]).is_file()
      module = Path(arguments.pop(0)).stem
  assert accepts(module, arguments)
  if module == 'bn_repro.lab.__main__':
    name, *flags = arguments
    name = 'gradients' if name == 'NAME' else name
    lab.load(name, overrides_of(flags), quick='--quick' in flags)
  elif module.startswith('bn_repro.'):
    check_config(arguments)


@pytest.mark.parametrize(
  'command, error',
  [
    ('python -m bn_repro.evaluate --workdirs=x', AssertionError),
    ('python scripts/compile_check.py --topologie=v5e:4x4', AssertionError),
    ('python scripts/no_such_script.py', AssertionError),
    ('bash scripts/quickstart.sh --fast', AssertionError),
    ('pip install --upgrde jax', SystemExit),
    ('python -m pip install -r requirement.txt', AssertionError),
    ('python -m bn_repro.lab gradeints --workdir=w', UserError),
    ('python -m bn_repro.main --config=bn_x --workdir=w', UserError),
    (f'python -m bn_repro.overview --config=bn_x5 {MISTAKE}', UserError),
  ],
)
def test_a_wrong_command_is_noticed(command, error, accepts):
  with pytest.raises(error):
    test_command(command, accepts)


def anchors(path):
  """The anchors of the headings of a document, as GitHub names them."""
  tokens = markdown_it.MarkdownIt().parse(path.read_text())
  headings = (
    after.content
    for token, after in itertools.pairwise(tokens)
    if token.type == 'heading_open'
  )
  return {
    re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
    for heading in headings
  }


def links(path):
  """Where the links and pictures of a document lead."""
  for token in parsed(path):
    target = token.attrGet('href') or token.attrGet('src')
    if target:
      yield target
    if token.type.startswith('html'):
      yield from re.findall(r'src="(.*?)"', token.content)


def test_links_lead_somewhere():
  for path in (*DOCUMENTS, *PAGES):
    for link in links(path):
      if link.startswith('https://'):
        continue
      name, _, anchor = link.partition('#')
      target = (path.parent / name).resolve() if name else path
      assert target.exists(), (path, link)
      if anchor:
        assert anchor in anchors(target), (path, link)


def test_the_index_names_every_document():
  named = set(links(ROOT / 'docs/index.md'))
  there = {
    path.name
    for path in (ROOT / 'docs').iterdir()
    if path.suffix in ('.md', '.ipynb')
  }
  assert named == there - {'index.md'} | {'../CONTRIBUTING.md'}


def test_the_readme_is_short():
  assert len(README.read_text().split()) <= 1200


@pytest.mark.parametrize('name', ['README.md', 'docs/trained_networks.md'])
def test_code(name, tmp_path, monkeypatch, capsys):
  """The code blocks of a document run, one after the other."""
  from PIL import Image

  (tmp_path / 'results').symlink_to(ROOT / 'results')
  for picture in ('seven.png', 'two.jpg'):
    Image.new('L', (40, 30)).save(tmp_path / picture)
  monkeypatch.chdir(tmp_path)
  namespace = {'__name__': 'document'}
  for block in blocks(ROOT / name, 'python'):
    exec(block, namespace)
  import jax

  images = jax.numpy.zeros((2, 8, 8, 3))
  variables = namespace['Network']().init(
    jax.random.key(0), images, train=False
  )
  assert variables['params']['BatchNorm_0'].keys() == {'scale', 'bias'}
  assert variables['batch_stats']['BatchNorm_0'].keys() == {'mean', 'var'}
