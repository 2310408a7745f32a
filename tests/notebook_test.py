"""The cells of the notebook, run in their order, print what it has."""

import json
from pathlib import Path
import sys
import types

import jax

ROOT = Path(__file__).resolve().parent.parent


def test_outputs(monkeypatch, capsys):
  """Pictures are drawn, but not compared: see the tests of the laboratory."""
  pictures = []
  display = types.ModuleType('IPython.display')
  display.Image = lambda data, width: pictures.append(data)
  monkeypatch.setitem(sys.modules, 'IPython.display', display)
  monkeypatch.setattr(sys, 'path', [*sys.path])
  monkeypatch.chdir(ROOT / 'docs')
  notebook = json.loads(Path('batch_norm.ipynb').read_text())
  namespace = {}
  num_pictures = 0
  for cell in notebook['cells']:
    if cell['cell_type'] != 'code':
      continue
    # Tests raise where it broadcasts ranks, as NumPy does.
    with jax.numpy_rank_promotion('allow'):
      exec(''.join(cell['source']), namespace)
    outputs = cell['outputs']
    expected = ''.join(
      ''.join(output['text'])
      for output in outputs
      if output['output_type'] == 'stream'
    )
    assert capsys.readouterr().out == expected
    num_pictures += sum('image/png' in o.get('data', ()) for o in outputs)
  assert len(pictures) == num_pictures > 0
  assert all(picture.startswith(b'\x89PNG') for picture in pictures)
