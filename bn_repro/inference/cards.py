"""Model cards: what a person has to know before using a network."""

from collections.abc import Sequence

from bn_repro.data import preprocess
from bn_repro.training import model_file

_BOXES = {
  'square': 'the central square of 224/256 of the shorter side',
  'proportional': 'the central 87.5 % of each side',
}
_NORMALIZATIONS = {
  'symmetric': 'values in [-1, 1]',
  'caffe': f'BGR in [0, 255] minus {preprocess.CAFFE_MEAN}',
  'torchvision': f'RGB in [0, 1] minus {preprocess.TORCHVISION_MEAN}, divided '
  f'by {preprocess.TORCHVISION_STD}',
}


def preprocessing(file: model_file.ModelFile) -> str:
  """Describes how an image becomes the input of the network."""
  height, width, channels = file.image_shape
  data = file.config.data
  color = 'gray' if channels == 1 else 'RGB'
  if file.unpadded_shape is None:
    view = f'{_BOXES[data.evaluation_box]}, resized to {width}x{height} {color}'
  else:
    rows, columns = file.unpadded_shape
    view = f'{columns}x{rows} pixels, {color}'
    if data.binarize:
      view += ', black or white'
    if (rows, columns) != (height, width):
      view += f', padded with black to {width}x{height}'
  return f'{view}; the network sees {_NORMALIZATIONS[data.normalization]}'


def card(file: model_file.ModelFile, name: str, notes: Sequence[str]) -> str:
  """Returns a model card in Markdown.

  Args:
    file: the network.
    name: of the file that the card is about.
    notes: paragraphs on its format.
  """
  config, facts = file.config, file.facts
  rows = {
    'network': f'{config.model.name}, width {config.model.width:g}, '
    f'{config.model.nonlinearity}, ' + _norm(file),
    'config': facts.get('config_file', ''),
    'source': _source(facts.get('source')),
    'trained on': f'{config.data.name}, fingerprint {facts["data_fingerprint"]}'
    if 'data_fingerprint' in facts
    else '',
    'accuracy': _accuracy(facts.get('evaluation')),
    'BN statistics': facts['statistics'] or '',
    'input': preprocessing(file),
    'classes': f'{len(file.label_names)}: {_shortened(file.label_names)}',
    'digest of the variables': file.digest,
    'revision of the code': facts.get('revision', ''),
  }
  table = [f'| {key} | {value} |' for key, value in rows.items() if value]
  return '\n'.join(
    [f'# {name}', '', '| | |', '|---|---|', *table, '']
    + [line for note in notes for line in (note, '')]
  )


def _norm(file: model_file.ModelFile) -> str:
  if file.facts.get('folded'):
    return 'batch normalization, folded into the layers'
  return 'batch normalization' if file.config.bn.enabled else 'without BN'


def _source(source: dict | None) -> str:
  """Returns where imported weights come from."""
  if not source:
    return ''
  return (
    f'{source["file"]} of {source["project"]}, SHA-256 {source["sha256"][:16]}'
  )


def _accuracy(line: dict | None) -> str:
  """Returns an accuracy with its counts."""
  if not line:
    return ''
  count = line['num_examples']
  correct = round(line['accuracy'] * count)
  return (
    f'{line["accuracy"]:.4f} ({correct:,} of {count:,} {line["split"]} images) '
    f'at step {line["step"]:,}'
  )


def _shortened(names: Sequence[str]) -> str:
  shown = ', '.join(names[:10])
  return shown if len(names) <= 10 else f'{shown}, ...'


STABLEHLO = """To run it, without this package:

```
import jax
import numpy as np

with open('{name}', 'rb') as file:
  program = jax.export.deserialize(bytearray(file.read()))
images = np.zeros((2, {height}, {width}, {channels}), np.uint8)
probabilities = jax.jit(program.call)(images)
```

The images are those that the network sees, before they are normalized: see
"input" above."""
