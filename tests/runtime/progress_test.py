"""What is shown of a run, on a terminal and elsewhere."""

import io
import sys

import pytest

from bn_repro.runtime import progress
from bn_repro.runtime.progress import ImageProgress, ProgressDisplay

LINE = {
  'step': 5,
  'split': 'train',
  'loss': 0.25,
  'accuracy': 0.5,
  'timing': {'shares': {'waiting_for_data': 0.0}, 'images_per_second': 7.0},
}
TEXT = 'step 5/10  train: loss 0.2500  accuracy 0.5000  7 images/s'
FORCING = (
  'FORCE_COLOR',
  'CLICOLOR_FORCE',
  'PY_COLORS',
  'TTY_COMPATIBLE',
  'TTY_INTERACTIVE',
)


class Terminal(io.StringIO):
  def isatty(self):
    return True


def shown(stream, monkeypatch, **environment):
  for name in (*FORCING, 'NO_COLOR'):
    monkeypatch.delenv(name, raising=False)
  for name, value in {'TERM': 'xterm', **environment}.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(sys, 'stdout', stream)
  with ProgressDisplay(10) as display:
    display.start(0)
    display.show(LINE)
  return stream.getvalue()


@pytest.mark.parametrize('name', FORCING)
def test_no_variable_makes_a_file_a_terminal(name, monkeypatch):
  text = shown(io.StringIO(), monkeypatch, **{name: '1'})
  assert text.startswith(TEXT) and '\x1b' not in text


@pytest.mark.parametrize('name', ['NO_COLOR', *FORCING])
@pytest.mark.parametrize('value', ['0', '1'])
def test_a_terminal_has_a_bar(name, value, monkeypatch):
  text = shown(Terminal(), monkeypatch, **{name: value})
  assert '\x1b[' in text and TEXT not in text
  assert 'loss 0.2500' in text


@pytest.mark.parametrize('stream', [io.StringIO, Terminal])
def test_no_columns(stream, monkeypatch):
  text = shown(stream(), monkeypatch, COLUMNS='0', LINES='0')
  assert 'loss 0.2500' in text


def test_text_is_not_markup(monkeypatch, capsys):
  text = 'a line longer than eighty columns: [red] :x: 12 /path ' + 50 * 'é '
  ProgressDisplay(10).say(text)
  assert capsys.readouterr().out == f'{text}\n'
  ProgressDisplay(10, silent=True).say(text)
  assert not capsys.readouterr().out


@pytest.mark.parametrize('term', ['dumb', 'unknown'])
def test_a_terminal_that_cannot_move_its_cursor_has_lines(term, monkeypatch):
  text = shown(Terminal(), monkeypatch, TERM=term, FORCE_COLOR='1')
  assert text.startswith(TEXT) and '\x1b' not in text


def images_shown(stream, monkeypatch):
  """Compiles for 100 s, then computes 10 of 200 images in 20 s."""
  clock = [0.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: clock[0])
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setattr(sys, 'stdout', stream)
  with ImageProgress('test', 100, 200) as display:
    for done, now, waited in ((110, 100, 90), (120, 120, 5), (130, 140, 7)):
      clock[0] = float(now)
      display.show(done, waited)
  return stream.getvalue()


def test_images_of_an_evaluation(monkeypatch):
  """The compilation counts in none of the rates."""
  rates = '0.50 images/s, 30% of the time waiting for images'
  assert images_shown(io.StringIO(), monkeypatch).splitlines() == [
    'test: resuming at image 100',
    'test: 110/200 images',
    f'test: 130/200 images, {rates}, ETA 2:20',
    f'test: 30 images in 2:20, {rates}',
  ]


def test_images_of_an_evaluation_have_a_bar_on_a_terminal(monkeypatch):
  text = images_shown(Terminal(), monkeypatch)
  assert '\x1b[' in text and 'ETA 2:20' in text
