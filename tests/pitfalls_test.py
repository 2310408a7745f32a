"""Each pitfall is guarded by a test, which exists."""

import ast
import functools
from pathlib import Path
import re

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / 'docs' / 'pitfalls.md').read_text()


@functools.cache
def names_in(path):
  """The names of a file's tests, as pytest writes them after its path."""

  def found(body, prefix=''):
    for node in body:
      if isinstance(node, ast.ClassDef):
        yield from found(node.body, f'{prefix}{node.name}::')
      elif isinstance(node, ast.FunctionDef) and node.name.startswith('test_'):
        yield prefix + node.name

  if not (ROOT / path).is_file():
    return frozenset()
  return frozenset(found(ast.parse((ROOT / path).read_text()).body))


def entries(text):
  """The title and the text of each item."""
  for item in re.split(r'\n(?=- |\n)', text):
    if item.startswith('- '):
      title, separator, rest = item.removeprefix('- **').partition('.** ')
      assert separator, item
      yield title, ' '.join(rest.split())


def problem(entry):
  """What is wrong with the guards of an entry; None if nothing is."""
  _, separator, guards = entry.partition(' Guarded by ')
  if not separator:
    return 'no guard'
  for guard in guards.split(', '):
    path, _, name = guard.strip('`').partition('::')
    if not re.fullmatch('`[^`]+`', guard) or name not in names_in(path):
      return guard
  return None


def test_each_pitfall_has_a_guard_that_exists():
  found = list(entries(PAGE))
  assert len(dict(found)) == len(found) == PAGE.count('\n- ') > 50
  assert {title: problem(text) for title, text in found if problem(text)} == {}


@pytest.mark.parametrize(
  'entry, expected',
  [
    ('A trap. Guarded by `tests/pitfalls_test.py::test_problems`', None),
    (
      'A trap. Guarded by `tests/pitfalls_test.py::test_problems`, '
      '`tests/models/batch_norm_test.py::TestDevices::test_gradient_with_a_mask`',
      None,
    ),
    ('A trap, of which nobody thought.', 'no guard'),
    (
      'A trap. Guarded by `tests/no_such_test.py::test_it`',
      '`tests/no_such_test.py::test_it`',
    ),
    (
      'A trap. Guarded by `tests/pitfalls_test.py::entries`',
      '`tests/pitfalls_test.py::entries`',
    ),
    # A method needs its class.
    (
      'A trap. Guarded by '
      '`tests/models/batch_norm_test.py::test_gradient_with_a_mask`',
      '`tests/models/batch_norm_test.py::test_gradient_with_a_mask`',
    ),
    (
      'A trap. Guarded by tests/pitfalls_test.py::test_problems',
      'tests/pitfalls_test.py::test_problems',
    ),
  ],
)
def test_problems(entry, expected):
  assert problem(entry) == expected
