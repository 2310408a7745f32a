"""`numerics.json` against the code, and the comparison itself."""

import json

import numerics as script
import pytest
import support

from bn_repro import numerics


def test_the_file_holds_what_the_code_computes():
  """`python scripts/numerics.py --write` writes it; its docstring says when."""
  said = support.run(program=('scripts/numerics.py',))
  assert said.returncode == 0, said.stdout + said.stderr


STORED = {'a/losses': [2.0, 0.5], 'jpeg/view': [100.0], 'order/none': [3, 1]}


@pytest.fixture
def written(tmp_path, monkeypatch):
  """A file of its own with the values `STORED`."""
  path = tmp_path / 'numerics.json'
  path.write_text(script.merge(STORED, {}))
  monkeypatch.setattr(numerics, 'FILE', path)
  return path


def run(found, monkeypatch, *flags):
  monkeypatch.setattr(script, '_compute', lambda: found)
  return script.main(flags)


@pytest.mark.parametrize(
  'changes',
  [
    {'a/losses': [2.0, 0.500004]},
    # A bit of a decoder, in some pixels.
    {'jpeg/view': [100.9]},
  ],
)
def test_what_is_close_changes_nothing(changes, written, monkeypatch, capsys):
  """Also when it is written: the digest is the same on every machine."""
  before = numerics.digest()
  assert json.loads(written.read_text()) == STORED
  for flags in ((), ('--write',)):
    assert run({**STORED, **changes}, monkeypatch, *flags) == 0
    assert capsys.readouterr().out.startswith('0 of 3 values differ')
  assert numerics.digest() == before


@pytest.mark.parametrize(
  'changes, line',
  [
    (
      {'a/losses': [2.0, 0.50002]},
      'a/losses: [2.0, 0.50002], in the file [2.0, 0.5]',
    ),
    (
      {'a/losses': [2.0, float('nan')]},
      'a/losses: [2.0, NaN], in the file [2.0, 0.5]',
    ),
    ({'a/losses': [2.0]}, 'a/losses: [2.0], in the file [2.0, 0.5]'),
    ({'jpeg/view': [101.1]}, 'jpeg/view: [101.1], in the file [100.0]'),
    ({'order/none': [1, 3]}, 'order/none: [1, 3], in the file [3, 1]'),
    ({'b/new': [1.0]}, 'b/new: [1.0], in the file missing'),
  ],
)
def test_what_differs_is_named(changes, line, written, monkeypatch, capsys):
  before = numerics.digest()
  assert run({**STORED, **changes}, monkeypatch) == 1
  assert capsys.readouterr().out.splitlines()[0] == line
  assert numerics.digest() == before


def test_what_differs_is_written(written, monkeypatch, capsys):
  """And nothing else: values that are close keep their digits."""
  before = numerics.digest()
  found = {'a/losses': [1 / 3], 'jpeg/view': [100.3]}
  assert run(found, monkeypatch, '--write') == 0
  out = capsys.readouterr().out
  assert 'order/none: missing, in the file [3, 1]' in out
  assert f'the digest is {numerics.digest()} now' in out
  assert numerics.digest() != before
  assert json.loads(written.read_text()) == {
    'a/losses': [0.333333],
    'jpeg/view': [100.0],
  }
