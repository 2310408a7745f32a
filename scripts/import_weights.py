"""Makes a workdir of weights that another project has trained.

  python scripts/import_weights.py --from=cadene --file=FILE --out=runs/cadene

The workdir holds the network as `model.safetensors`, and `config.json`, with
the input that the weights expect. `config.init_from` takes it too.

  --from=slim       `inception_v2` of TF-Slim: a TensorFlow checkpoint, which is
                    read in the environment of `scripts/prepare_imagenet.sh`, or
                    its variables by name in a .npz file. Of 1,001 classes, the
                    first, the background, is dropped.
  --from=cadene     `bninception` of Cadene's pretrained-models.pytorch: Caffe's
                    BN-Inception, as .pth (needs PyTorch) or .safetensors.
  --from=pytorchcv  `bninception` of pytorchcv, in the same formats.
"""

import argparse
from collections.abc import Mapping, Sequence
import datetime
import hashlib
import os
from pathlib import Path
import shlex
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bn_repro
from bn_repro import cli, files
from bn_repro import config as config_lib
from bn_repro.data import imagenet_metadata
from bn_repro.errors import UserError
from bn_repro.inference import layouts
from bn_repro.runtime.workdir import Status, Workdir

if TYPE_CHECKING:  # It imports JAX.
  from bn_repro.training.model_file import ModelFile

# Runs `_DUMP` with TensorFlow.
_TENSORFLOW = """
source scripts/environment.sh
use_environment requirements-prepare.txt .venv-prepare
exec python -c "$@"
"""
# Writes all variables of a checkpoint to a .npz file.
_DUMP = """
import sys
import numpy as np
import tensorflow as tf
try:
  reader = tf.train.load_checkpoint(sys.argv[1])
  names = reader.get_variable_to_shape_map()
  np.savez(sys.argv[2], **{name: reader.get_tensor(name) for name in names})
except Exception as error:
  sys.exit(' '.join(str(error).split()))
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = cli.Parser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--from',
    dest='source',
    required=True,
    choices=(*layouts.LAYOUTS, 'caffe'),
    help='project that the weights come from',
  )
  files.add_path_argument(
    parser, '--file', required=True, metavar='FILE', help='the weights'
  )
  files.add_path_argument(
    parser, '--out', required=True, help='workdir to make; must not exist'
  )
  files.add_path_argument(
    parser,
    '--label_names',
    metavar='FILE',
    help="names of the classes, one a line; ImageNet's are known",
  )
  try:
    flags = parser.parse_args(argv)
    _import(flags.source, flags.file, flags.out, flags.label_names)
  except UserError as error:
    return cli.report_user_error(error)
  return 0


def _import(
  source: str, file: Path, out: Path, label_names: Path | None
) -> None:
  if source == 'caffe':
    raise UserError(
      '--from=caffe: no maintained package reads .caffemodel files. Cadene '
      "publishes the weights of Caffe's BN-Inception for PyTorch: use them "
      'with --from=cadene.'
    )
  if out.exists():
    raise UserError(f'--out={out}: exists already. Name a new folder.')
  # TensorFlow 2 writes a checkpoint as several files, with this one among them.
  index = file.with_name(f'{file.name}.index')
  if not file.is_file() and not (source == 'slim' and index.is_file()):
    raise UserError(f'--file={file}: no such file.')
  layout = layouts.LAYOUTS[source]
  config = config_lib.load('inception', layout.fields)
  arrays = _read_slim(file) if source == 'slim' else _read_torch(file)
  num_classes = layouts.num_classes(layout, arrays)

  cli.set_up_jax(config)
  from bn_repro import parallel
  from bn_repro.models import factory
  from bn_repro.training import model_file, run_info

  image_shape = (config.data.image_size, config.data.image_size, 3)
  network = factory.create_model(config.model, config.bn, num_classes)
  leaves = parallel.named_leaves(factory.variable_shapes(network, image_shape))
  shapes = {path: leaf.shape for path, leaf in leaves.items()}
  arrays = _checked(source, file, arrays, shapes)
  variables = layouts.to_ours(layout, arrays, shapes, config.bn.epsilon)
  revision = run_info.git_revision(print)
  origin = {
    'project': source,
    'file': file.name,
    'sha256': _sha256(file if file.is_file() else index),
  }
  model = model_file.ModelFile(
    variables=model_file.nested(variables),
    config=config,
    label_names=_label_names(label_names, num_classes),
    image_shape=image_shape,
    unpadded_shape=None,
    facts={'statistics': 'moving', 'source': origin, 'revision': revision},
  )
  num_parameters = sum(
    x.size for path, x in variables.items() if path.startswith('params/')
  )
  run = {
    'command': shlex.join(['python', *sys.orig_argv[1:]]),
    'started': datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds'),
    'versions': run_info.versions(),
    'version': bn_repro.__version__,
    'git_revision': revision,
    'num_parameters': num_parameters,
    'num_classes': num_classes,
    'start_step': 0,
    'source': origin,
  }
  _write(out, run, model)
  print(
    f'{out}: {num_parameters:,} parameters, {num_classes:,} classes, from '
    f'{file.name}'
  )


def _write(out: Path, run: Mapping[str, Any], model: 'ModelFile') -> None:
  """Writes a workdir, which appears when it is complete.

  Raises:
    UserError: if it cannot be written.
  """
  from bn_repro.training import model_file

  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.', dir=out.parent) as temporary:
      workdir = Workdir(Path(temporary) / out.name)
      workdir.path.mkdir()
      workdir.write_config(model.config)
      workdir.write_run(run)
      model_file.write(workdir.path / model_file.NAME, model)
      workdir.write_status(Status.DONE, 0, 'imported, not trained')
      workdir.path.rename(out)
  except OSError as error:
    raise UserError(
      f'--out={out}: cannot be written ({error.strerror}).'
    ) from error


def _read_slim(file: Path) -> dict[str, np.ndarray]:
  """Reads the variables of a checkpoint, without those of its optimizer."""
  if file.suffix == '.npz':
    arrays = _read_npz(file)
  else:
    with tempfile.TemporaryDirectory() as folder:
      dump = Path(folder) / 'variables.npz'
      result = subprocess.run(
        ('bash', '-ec', _TENSORFLOW, 'bash', _DUMP, file, dump),
        cwd=ROOT,
        env={
          **os.environ,
          'TF_CPP_MIN_LOG_LEVEL': '3',
          'TF_ENABLE_ONEDNN_OPTS': '0',
        },
        stderr=subprocess.PIPE,
        text=True,
        check=False,
      )
      if result.returncode:
        reason = (result.stderr.strip().splitlines() or ['no reason given'])[-1]
        raise UserError(
          f'--file={file}: TensorFlow cannot read it as a checkpoint: {reason}'
        )
      arrays = _read_npz(dump)
  # TF-Slim names a variable of the optimizer after the one that it belongs to.
  return layouts.without_background(
    {
      name: array
      for name, array in arrays.items()
      if name != 'global_step' and name.rpartition('/')[0] not in arrays
    }
  )


def _read_npz(file: Path) -> dict[str, np.ndarray]:
  try:
    with file.open('rb') as content, np.load(content) as arrays:
      return {name: arrays[name] for name in arrays.files}
  # Damaged archives raise errors of zipfile, of zlib and of NumPy.
  except Exception as error:
    raise UserError(f'--file={file}: damaged: {error}.') from error


def _read_torch(file: Path) -> dict[str, np.ndarray]:
  """Reads tensors by name, without the counters of batches."""
  if file.suffix == '.safetensors':
    from bn_repro.training import model_file

    try:
      arrays, _ = model_file.read_arrays(file)
    except ValueError as error:
      raise UserError(f'--file={file}: damaged: {error}.') from error
  else:
    arrays = _read_pickle(file)
  return {
    name: array.astype(np.float32)
    for name, array in arrays.items()
    if not name.endswith('.num_batches_tracked')
  }


def _read_pickle(file: Path) -> dict[str, np.ndarray]:
  try:
    import torch
  except ImportError as error:
    raise UserError(
      f'--file={file}: reading it needs PyTorch (pip install torch). Weights '
      'in a .safetensors file do not.'
    ) from error
  try:
    # Runs no code of the file.
    tensors = torch.load(file, map_location='cpu', weights_only=True)
    return {str(name): x.float().numpy() for name, x in tensors.items()}
  except Exception as error:  # PyTorch raises what pickle and zip raise.
    reason = (str(error).splitlines() or [''])[0]
    raise UserError(
      f'--file={file}: not tensors by name, as torch.save writes a state_dict '
      f'({type(error).__name__}: {reason}).'
    ) from error


def _label_names(file: Path | None, num_classes: int) -> list[str]:
  """The names of the classes: those of a file, or ImageNet's."""
  if file is not None:
    try:
      names = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(
        f'--label_names={file}: cannot be read ({error}).'
      ) from error
    if len(names) != num_classes:
      raise UserError(
        f'--label_names={file}: has {len(names):,} lines, and the network '
        f'{num_classes:,} classes.'
      )
    return names
  if num_classes != imagenet_metadata.NUM_CLASSES:
    raise UserError(
      f"the network has {num_classes:,} classes, which are not ImageNet's: "
      'name them with --label_names=FILE, one a line.'
    )
  return imagenet_metadata.class_names()


def _checked(
  source: str,
  file: Path,
  arrays: Mapping[str, np.ndarray],
  shapes: Mapping[str, Any],
) -> dict[str, np.ndarray]:
  """Returns the arrays, which have the names and shapes of the layout.

  Raises:
    UserError: if any is missing, left over or of another shape; with all.
  """
  from bn_repro.training import model_file

  names = {
    name: set(layouts.their_shapes(layout, shapes))
    for name, layout in layouts.LAYOUTS.items()
  }
  if not names[source] & set(arrays):
    others = [name for name in names if names[name] & set(arrays)]
    hint = f'It has those of --from={others[0]}.' if others else ''
    raise UserError(
      f'--file={file}: has none of the names of --from={source}. {hint}'
    )
  expected = {
    name: np.broadcast_to(np.float32(0), shape)
    for name, shape in layouts.their_shapes(
      layouts.LAYOUTS[source], shapes
    ).items()
  }
  # Vectors have a leading axis of length 1 in the file that Cadene publishes.
  arrays = {
    name: array[0]
    if name in expected and array.shape == (1, *expected[name].shape)
    else array
    for name, array in arrays.items()
  }
  problems = model_file.mismatches(expected, arrays)
  if problems:
    raise UserError(
      f'--file={file}: not the network of --from={source}. All differences:',
      *problems,
    )
  return arrays


def _sha256(file: Path) -> str:
  with file.open('rb') as content:
    return hashlib.file_digest(content, 'sha256').hexdigest()


if __name__ == '__main__':
  sys.exit(cli.run(main))
