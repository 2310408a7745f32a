"""Fixtures for stand-ins."""

import os

import pytest
from stand_ins import ENDS, stand_in


@pytest.fixture
def bin_dir(tmp_path, monkeypatch):
  """A folder for stand-ins, first on the path."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')
  return folder


@pytest.fixture
def notes(tmp_path, monkeypatch, bin_dir):
  """The folder where stand-ins find what to do and record what they did."""
  folder = tmp_path / 'notes'
  folder.mkdir()
  monkeypatch.setenv('NOTES', str(folder))
  stand_in(bin_dir / 'train', ENDS)
  stand_in(bin_dir / 'sleep', 'echo "$1" >>"$NOTES/pauses"\n')
  return folder
