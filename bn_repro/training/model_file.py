"""Model files: the variables of a trained network, and how to use them.

A run writes `model.safetensors` into its workdir after each evaluation: the
parameters that were evaluated, and the BN statistics of Algorithm 2. The header
of the file holds the config, the size of the images and the names of the
classes, so that it can be used without the training data. It holds no code.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
import numpy as np
import safetensors
import safetensors.numpy

from bn_repro import config as config_lib
from bn_repro import parallel
from bn_repro.errors import UserError
from bn_repro.runtime import workdir

# Name of the file in a workdir.
NAME = workdir.MODEL

# The entry of the header that holds `ModelFile.facts`.
_ENTRY = 'bn_repro'
# What JSON raises that is damaged or of another shape.
_BAD_JSON = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
# Largest header that is read. That of Inception has 60 kB, and that of 1,000
# class names 20 kB more. Our choice.
_MAX_HEADER = 10_000_000


@dataclasses.dataclass(frozen=True)
class ModelFile:
  """A trained network.

  Attributes:
    variables: `params` and `batch_stats`, nested dicts of NumPy arrays.
    config: the config of the run.
    label_names: name of each class, by label.
    image_shape: (height, width, channels) of the network's input.
    unpadded_shape: (height, width) of the images before they were padded to
      `image_shape`; None if images are cropped to it.
    facts: further facts, a JSON object: `statistics` (population, moving, or
      None without BN), `evaluation` (the line of metrics of these variables),
      `data_fingerprint` of the training data, `config_file` (the value of
      --config), `revision` of the code, `source` (of imported weights) and
      `folded` (if BN was merged into the layers).
  """

  variables: Mapping[str, Any]
  config: ConfigDict
  label_names: Sequence[str]
  image_shape: tuple[int, int, int]
  unpadded_shape: tuple[int, int] | None
  facts: Mapping[str, Any]

  @property
  def digest(self) -> str:
    """SHA-256 of all variables, 16 hexadecimal digits."""
    return _digest(parallel.named_leaves(self.variables))


def _digest(arrays: Mapping[str, Any]) -> str:
  found = hashlib.sha256()
  for name in sorted(arrays):
    array = np.asarray(arrays[name])
    found.update(f'{name} {array.dtype} {array.shape}'.encode())
    found.update(array.tobytes())
  return found.hexdigest()[:16]


def write(path: Path, model: ModelFile) -> None:
  """Writes a model file atomically."""
  workdir.replace_file(path, to_bytes(model))


def to_bytes(model: ModelFile) -> bytes:
  """Returns the content of a model file."""
  arrays = {
    name: np.ascontiguousarray(x)
    for name, x in parallel.named_leaves(model.variables).items()
  }
  header = workdir.add_checksum(
    {
      'config': model.config.to_dict(),
      'label_names': list(model.label_names),
      'image_shape': list(model.image_shape),
      'unpadded_shape': model.unpadded_shape and list(model.unpadded_shape),
      'facts': dict(model.facts),
      'digest': _digest(arrays),
    }
  )
  return safetensors.numpy.save(arrays, {_ENTRY: json.dumps(header)})


def read(path: Path) -> ModelFile:
  """Reads a model file and compares it with its checksums.

  Args:
    path: a file that `write` has written.

  Raises:
    UserError: if it does not exist, cannot be read, is damaged, or is not a
      model file of this project.
  """
  try:
    arrays, metadata = read_arrays(path)
    if _ENTRY not in metadata:
      raise ValueError(
        'a safetensors file of another project; scripts/import_weights.py '
        'converts some of them'
      )
    header = workdir.remove_checksum(json.loads(metadata[_ENTRY]))
    if header['digest'] != _digest(arrays):
      raise ValueError('the arrays do not match their checksum')
    config, unpadded = header['config'], header['unpadded_shape']
    content: dict[str, Any] = {
      'variables': nested(arrays),
      'label_names': tuple(header['label_names']),
      'image_shape': tuple(header['image_shape']),
      'unpadded_shape': unpadded and tuple(unpadded),
      'facts': dict(header['facts']),
    }
  except _BAD_JSON as error:
    raise UserError(f'{path}: not a sound model file: {error}.') from error
  return ModelFile(config=config_lib.from_json(config, str(path)), **content)


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Reads the arrays and the metadata of any safetensors file.

  Raises:
    UserError: if the file does not exist or cannot be read.
    ValueError: if it is damaged. Nothing is allocated for what its header
      claims and the file does not hold.
  """
  try:
    # Opened once: a run may replace the file meanwhile.
    with path.open('rb') as file:
      size = os.fstat(file.fileno()).st_size
      prefix = file.read(8)
      length = int.from_bytes(prefix, 'little')
      if size < 8 or length > size - 8:
        raise ValueError(f'truncated, or no safetensors file: {size:,} bytes')
      if length > _MAX_HEADER:
        raise ValueError(f'its header has {length:,} bytes')
      text = file.read(length)
      metadata, total = _parse_header(text)
      if total != size - 8 - length:
        raise ValueError(f'its header claims {total:,} bytes of arrays')
      arrays = safetensors.numpy.load(prefix + text + file.read())
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}).') from error
  except (safetensors.SafetensorError, LookupError, TypeError) as error:
    raise ValueError(' '.join(str(error).split())) from error
  return arrays, metadata


def _parse_header(text: bytes) -> tuple[dict[str, str], int]:
  """Returns the metadata of a header, and the bytes of its arrays."""
  try:
    header = json.loads(text)
    metadata = dict(header.pop('__metadata__', {}))
    offsets = [entry['data_offsets'] for entry in header.values()]
    return metadata, sum(end - begin for begin, end in offsets)
  except _BAD_JSON as error:
    raise ValueError('its header is damaged') from error


def nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Returns nested dicts for names such as 'params/conv1/conv/kernel'."""
  tree: dict[str, Any] = {'params': {}, 'batch_stats': {}}
  for name, array in arrays.items():
    *parents, leaf = name.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = array
  return tree


def mismatches(
  expected: Mapping[str, Any], found: Mapping[str, Any]
) -> list[str]:
  """Returns a line for each variable that is missing, unknown or misshapen.

  Args:
    expected: tree of arrays, or of their shapes and dtypes.
    found: tree of arrays.
  """
  shapes, found_shapes = (
    {name: tuple(x.shape) for name, x in parallel.named_leaves(tree).items()}
    for tree in (expected, found)
  )
  lines = []
  for name in sorted(shapes.keys() | found_shapes.keys()):
    shape, found_shape = shapes.get(name), found_shapes.get(name)
    if found_shape is None:
      lines.append(f'{name}: missing')
    elif shape is None:
      lines.append(f'{name}: not a variable of the network')
    elif found_shape != shape:
      lines.append(f'{name}: shape {found_shape}, not {shape}')
  return lines
