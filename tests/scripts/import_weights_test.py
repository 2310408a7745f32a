"""Weights of other projects as workdirs, on a tiny network in their layouts."""

import dataclasses
import json
import shutil
import subprocess

import import_weights
import numpy as np
import pytest
import safetensors.numpy
import torch
import weights_case

from bn_repro import cli, parallel
from bn_repro import config as config_lib
from bn_repro.data import imagenet_metadata
from bn_repro.errors import UserError
from bn_repro.inference import layouts
from bn_repro.models import factory
from bn_repro.training import checkpoint, model_file, steps

TINY = ('model.name=inception_tiny', 'model.width=0.1')


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
  """Every layout is that of a network of two modules."""
  monkeypatch.setattr(cli, 'set_up_jax', lambda config: None)
  monkeypatch.setattr(
    layouts,
    'LAYOUTS',
    {
      name: dataclasses.replace(layout, fields=(*layout.fields, *TINY))
      for name, layout in layouts.LAYOUTS.items()
    },
  )


def create(source, num_classes):
  """Shapes of our variables."""
  config = config_lib.load('inception', layouts.LAYOUTS[source].fields)
  model = factory.create_model(config.model, config.bn, num_classes)
  leaves = parallel.named_leaves(factory.variable_shapes(model, (224, 224, 3)))
  return {path: leaf.shape for path, leaf in leaves.items()}


def draw(source, num_classes=1000):
  """Random float32 weights in a layout."""
  drawn = weights_case.draw(
    layouts.their_shapes(layouts.LAYOUTS[source], create(source, num_classes))
  )
  return {name: x.astype(np.float32) for name, x in drawn.items()}


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for path, array in expected.items():
    np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.fixture
def run(tmp_path, capsys):
  """Imports a file into `tmp_path / 'out'`; the exit code and what it said.

  After a failure, nothing is left of it.
  """

  def call(source, file, *flags):
    before = sorted(tmp_path.rglob('*'))
    code = import_weights.main(
      [
        f'--from={source}',
        f'--file={file}',
        f'--out={tmp_path / "out"}',
        *flags,
      ]
    )
    said = capsys.readouterr()
    assert code in (0, 1)
    if code:
      assert sorted(tmp_path.rglob('*')) == before
      assert said.out == ''
      assert all(line.startswith('error: ') for line in said.err.splitlines())
    return code, said.out + said.err

  return call


def save(path, arrays):
  """Writes a file of a format that the suffix of the path names."""
  if path.suffix == '.safetensors':
    safetensors.numpy.save_file(arrays, path)
  elif path.suffix == '.npz':
    np.savez(path, **arrays)
  else:
    tensors = {name: torch.tensor(x) for name, x in arrays.items()}
    torch.save(tensors, path)
  return path


@pytest.mark.parametrize(
  'source, file, fields',
  [
    ('slim', 'w.npz', {'model.reading': '576', 'bn.epsilon': 1e-3}),
    (
      'cadene',
      'w.pth',
      {
        'model.reading': '608',
        'model.padding': 'torch',
        'bn.epsilon': 1e-5,
        'data.normalization': 'caffe',
      },
    ),
    ('pytorchcv', 'w.safetensors', {'data.normalization': 'torchvision'}),
  ],
)
def test_import(source, file, fields, run, tmp_path):
  """The workdir is complete, and its network is that of the weights."""
  arrays = draw(source)
  code, said = run(source, save(tmp_path / file, arrays))
  assert code == 0, said
  out = tmp_path / 'out'
  assert {path.name for path in out.iterdir()} == {
    *('config.json', 'run.json', 'status.json', 'model.safetensors'),
  }
  config = cli.read_config(out)
  flat = config_lib.flatten(config)
  assert {name: flat[name] for name in fields} == fields
  assert flat['bn.enabled'] and not flat['model.lrn']
  status = json.loads((out / 'status.json').read_text())
  assert (status['status'], status['step']) == ('done', 0)
  facts = json.loads((out / 'run.json').read_text())
  assert facts['source']['project'] == source
  assert facts['source']['file'] == file
  assert facts['num_classes'] == 1000

  model = model_file.read(out / model_file.NAME)
  assert model.config == config
  assert model.label_names == tuple(imagenet_metadata.class_names())
  assert model.facts['statistics'] == 'moving'
  assert model.facts['source'] == facts['source']
  assert 'evaluation' not in model.facts
  shapes = create(source, 1000)
  expected = layouts.to_ours(
    layouts.LAYOUTS[source], arrays, shapes, config.bn.epsilon
  )
  assert_same(parallel.named_leaves(model.variables), expected)


def test_published_file_of_cadene(run, tmp_path):
  """Its vectors have a leading axis; newer files count batches as well."""
  arrays = draw('cadene')
  as_published = {
    name: x[None] if x.ndim == 1 else x for name, x in arrays.items()
  }
  as_published['conv2_3x3_bn.num_batches_tracked'] = np.array(5)
  assert run('cadene', save(tmp_path / 'w.pth', as_published))[0] == 0
  shutil.move(tmp_path / 'out', tmp_path / 'published')
  assert run('cadene', save(tmp_path / 'w.pth', arrays))[0] == 0
  found, expected = (
    model_file.read(tmp_path / name / model_file.NAME).digest
    for name in ('published', 'out')
  )
  assert found == expected


def test_background_and_variables_of_the_optimizer(run, tmp_path):
  arrays = draw('slim', 1001)
  scope = 'InceptionV2/Conv2d_2c_3x3/weights'
  slots = {f'{scope}/RMSProp': arrays[scope], 'global_step': np.array(7)}
  assert run('slim', save(tmp_path / 'w.npz', {**arrays, **slots}))[0] == 0
  model = model_file.read(tmp_path / 'out' / model_file.NAME)
  np.testing.assert_array_equal(
    model.variables['params']['classifier']['bias'],
    arrays['InceptionV2/Logits/Conv2d_1c_1x1/biases'][1:],
  )


def test_own_classes(run, tmp_path):
  file = save(tmp_path / 'w.safetensors', draw('cadene', 2))
  code, said = run('cadene', file)
  assert code == 1 and 'name them with --label_names' in said
  names = tmp_path / 'names.txt'
  names.write_text('cat\n')
  code, said = run('cadene', file, f'--label_names={names}')
  assert code == 1 and 'has 1 lines, and the network 2 classes' in said
  names.write_text('cat\ndog\n')
  assert run('cadene', file, f'--label_names={names}')[0] == 0
  model = model_file.read(tmp_path / 'out' / model_file.NAME)
  assert model.label_names == ('cat', 'dog')


def test_all_differences_are_listed(run, tmp_path):
  arrays = draw('cadene')
  del arrays['inception_3a_1x1.weight']
  arrays['extra.weight'] = np.zeros(3, np.float32)
  arrays['conv1_7x7_s2.weight'] = arrays['conv1_7x7_s2.weight'][:, :, 1:6, 1:6]
  code, said = run('cadene', save(tmp_path / 'w.safetensors', arrays))
  assert code == 1
  assert said.splitlines()[1:] == [
    'error: conv1_7x7_s2.weight: shape (6, 3, 5, 5), not (6, 3, 7, 7)',
    'error: extra.weight: not a variable of the network',
    'error: inception_3a_1x1.weight: missing',
  ]


def test_weights_of_another_project(run, tmp_path):
  file = save(tmp_path / 'w.safetensors', draw('pytorchcv'))
  code, said = run('cadene', file)
  assert code == 1 and 'It has those of --from=pytorchcv.' in said
  file = save(tmp_path / 'w.safetensors', {'x': np.zeros(3, np.float32)})
  code, said = run('cadene', file)
  assert code == 1 and said.count('\n') == 1
  assert 'has none of the names of --from=cadene' in said


@pytest.mark.parametrize(
  'source, name, message',
  [
    ('cadene', 'w.safetensors', 'damaged'),
    ('cadene', 'w.pth', 'not tensors by name'),
    ('slim', 'w.npz', 'damaged'),
  ],
)
def test_truncated_file(source, name, message, run, tmp_path):
  file = save(tmp_path / name, draw(source))
  whole = file.read_bytes()
  for length in (0, 7, len(whole) // 2):
    file.write_bytes(whole[:length])
    code, said = run(source, file)
    assert code == 1 and said.count('\n') == 1
    assert f'--file={file}: ' in said
    assert message in said


def test_pickle_that_would_run_code_is_refused(run, tmp_path):
  class Malicious:
    def __reduce__(self):
      return (tmp_path.joinpath('created').mkdir, ())

  torch.save({'conv1_7x7_s2.weight': Malicious()}, tmp_path / 'w.pth')
  code, said = run('cadene', tmp_path / 'w.pth')
  assert code == 1 and 'not tensors by name' in said


def test_without_pytorch(run, tmp_path, monkeypatch):
  file = save(tmp_path / 'w.pth', draw('cadene'))
  monkeypatch.setitem(import_weights.sys.modules, 'torch', None)
  code, said = run('cadene', file)
  assert code == 1 and 'pip install torch' in said and '.safetensors' in said


def test_refused_before_anything_is_read(run, tmp_path):
  code, said = run('caffe', tmp_path / 'w.caffemodel')
  assert code == 1 and 'with --from=cadene' in said
  code, said = run('cadene', tmp_path / 'none.pth')
  assert code == 1 and 'no such file' in said
  (tmp_path / 'out').mkdir()
  code, said = run('cadene', save(tmp_path / 'w.pth', {}))
  assert code == 1 and 'exists already' in said


def test_no_space_leaves_nothing(run, tmp_path, monkeypatch):
  file = save(tmp_path / 'w.safetensors', draw('cadene'))

  def fail(*arguments):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(model_file, 'write', fail)
  code, said = run('cadene', file)
  assert code == 1 and 'No space left on device' in said


def test_init_from(run, tmp_path):
  """A new state takes the weights, and another number of classes is named."""
  assert run('cadene', save(tmp_path / 'w.safetensors', draw('cadene')))[0] == 0
  out = str(tmp_path / 'out')

  def state(num_classes):
    zeros = model_file.nested(
      {
        path: np.zeros(shape, np.float32)
        for path, shape in create('cadene', num_classes).items()
      }
    )
    return steps.TrainState(0, 0, zeros['params'], zeros['batch_stats'], ())

  warm = checkpoint.warm_start(state(1000), out)
  variables = model_file.read(tmp_path / 'out' / model_file.NAME).variables
  assert_same(
    parallel.named_leaves(
      {'params': warm.params, 'batch_stats': warm.batch_stats}
    ),
    parallel.named_leaves(variables),
  )
  with pytest.raises(UserError, match='has 1,000 classes, and the data set 10'):
    checkpoint.warm_start(state(10), out)


# Writes the arrays of a .npz file as checkpoints of TensorFlow 1 and 2.
_WRITE = """
import sys
import numpy as np
import tensorflow.compat.v1 as tf
tf.disable_eager_execution()
for name, x in np.load(sys.argv[1]).items():
  tf.get_variable(name, initializer=x)
with tf.Session() as session:
  session.run(tf.global_variables_initializer())
  for version, path in ((1, 'old.ckpt'), (2, 'new.ckpt')):
    saver = tf.train.Saver(write_version=version)
    saver.save(session, sys.argv[2] + '/' + path, write_meta_graph=False)
"""


@pytest.mark.slow
def test_checkpoint_of_tensorflow(run, tmp_path):
  """Of both formats; the file that TF-Slim publishes is of the first."""
  arrays = draw('slim', 1001)
  dump = save(tmp_path / 'w.npz', arrays)
  assert run('slim', dump)[0] == 0
  shutil.move(tmp_path / 'out', tmp_path / 'npz')
  subprocess.run(
    ('bash', '-ec', import_weights._TENSORFLOW, 'bash', _WRITE, dump, tmp_path),
    check=True,
    cwd=import_weights.ROOT,
    capture_output=True,
  )
  for name in ('old.ckpt', 'new.ckpt'):
    code, said = run('slim', tmp_path / name)
    assert code == 0, said
    found, expected = (
      model_file.read(tmp_path / folder / model_file.NAME).digest
      for folder in ('out', 'npz')
    )
    assert found == expected
    shutil.rmtree(tmp_path / 'out')
  (tmp_path / 'old.ckpt').write_bytes(b'truncated')
  code, said = run('slim', tmp_path / 'old.ckpt')
  assert code == 1 and 'TensorFlow cannot read it' in said
