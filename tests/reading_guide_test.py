"""The guides name what exists; no equation and no fault is without a test."""

import ast
import functools
from pathlib import Path
import re

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / 'docs' / 'reading_guide.md').read_text()
FAULTS = (ROOT / 'docs' / 'faults.md').read_text()
EQUATIONS = 'tests/equations_test.py'


@functools.cache
def tree(path):
  return ast.parse((ROOT / path).read_text())


def defined(body, prefix=''):
  """Names of functions, classes and variables; members as `Class.member`."""
  for node in body:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      yield prefix + node.name
      if isinstance(node, ast.ClassDef):
        yield from defined(node.body, f'{prefix}{node.name}.')
    elif isinstance(node, ast.Assign | ast.AnnAssign):
      targets = node.targets if isinstance(node, ast.Assign) else [node.target]
      for name in (n for target in targets for n in ast.walk(target)):
        if isinstance(name, ast.Name):
          yield prefix + name.id


@functools.cache
def definitions(path):
  return frozenset(defined(tree(path).body))


@functools.cache
def fields():
  """Dotted names of the config's fields, without those of sub-configs."""
  assigned = (
    (ast.unparse(node.targets[0]), ast.unparse(node.value))
    for node in ast.walk(tree('configs/inception.py'))
    if isinstance(node, ast.Assign)
  )
  return frozenset(
    target.removeprefix('config.')
    for target, value in assigned
    if target.startswith('config.') and value != 'ConfigDict()'
  )


def names(text):
  """The code spans; a `:name` is completed by the last file in its cell."""
  for block in re.split(r'\n\n|\|', text):
    path = ''
    for span in re.findall(r'`([^`]+)`', block):
      before, colon, name = span.partition(':')
      if colon or '/' in before:
        path = before or path
        yield f'{path}{colon}{name}'
      else:
        yield span


def exists(name):
  path, colon, definition = name.partition(':')
  if '/' not in path:
    return not colon and path in fields()
  if not (ROOT / path).is_file():
    return False
  return not colon or (path.endswith('.py') and definition in definitions(path))


@pytest.mark.parametrize(
  'text, number', [(GUIDE, 200), (FAULTS, 60)], ids=['reading_guide', 'faults']
)
def test_every_name_exists(text, number):
  found = list(names(text))
  assert text.count('`') % 2 == 0
  assert len(found) > number
  assert [name for name in found if not exists(name)] == []


def test_every_equation_is_in_the_guide():
  tests = {d for d in definitions(EQUATIONS) if d.startswith('test_')}
  assert len(tests) > 10
  mentioned = set(names(GUIDE))
  assert {t for t in tests if f'{EQUATIONS}:{t}' not in mentioned} == set()


def test_every_fault_has_a_test():
  rows = re.findall(r'^\| (\d+) \|.*\| (.*) \|$', FAULTS, flags=re.MULTILINE)
  assert [int(number) for number, _ in rows] == list(range(1, 30))
  test = re.compile(r'tests/\S+:test_\w+')
  for number, tests in rows:
    found = list(names(tests))
    assert found and all(map(test.fullmatch, found)), number


@pytest.mark.parametrize(
  'text, wrong',
  [
    ('`bn_repro/models/batch_norm.py:batch_moments`, `:batch_norm`', []),
    (
      '`bn_repro/models/batch_norm.py:BatchNorm.axis`, `bn.enabled`, `seed`',
      [],
    ),
    ('`tests/tpu/collectives.txt`', []),
    ('`bn_repro/no_such.py`', ['bn_repro/no_such.py']),
    (
      '`bn_repro/models/batch_norm.py:batch_mean`',
      ['bn_repro/models/batch_norm.py:batch_mean'],
    ),
    # A method needs its class.
    (
      '`bn_repro/models/batch_norm.py:total`',
      ['bn_repro/models/batch_norm.py:total'],
    ),
    ('`tests/tpu/collectives.txt:table`', ['tests/tpu/collectives.txt:table']),
    # A file holds only for the rest of its cell.
    ('`bn_repro/models/mlp.py:Mlp` | `:PROBE`', [':PROBE']),
    ('`bn.momenta`, `bn`, `batch_norm`', ['bn.momenta', 'bn', 'batch_norm']),
  ],
)
def test_names_that_do_not_exist(text, wrong):
  assert [name for name in names(text) if not exists(name)] == wrong
