"""The code of docs/interoperation.md, run as it stands, against linen."""

import contextlib
import csv
import json
from pathlib import Path
import re
import sys
import types

import jax
import numpy as np
import optax
import pytest

from bn_repro.models.batch_norm import BatchNorm
from bn_repro.runtime.metric_writer import MetricWriter
from bn_repro.runtime.progress import ProgressDisplay
from bn_repro.runtime.workdir import Workdir, read_metrics

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / 'docs' / 'interoperation.md').read_text()
BLOCKS = re.findall(r'^```(\w*)\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL)
LAYER, NETWORK, CSV, WANDB = (code for kind, code in BLOCKS if kind == 'python')
# Lines of a group and the names in it.
TAGS = BLOCKS[-1][1]


@pytest.fixture
def folder(trained_workdir, tmp_path, monkeypatch):
  """The current folder, which has the workdir that the page names."""
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'bn_x5').symlink_to(trained_workdir)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def assert_close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def linen_layer_step(params, statistics, images, labels):
  """Parameters after a step of SGD, updated statistics and the loss."""

  def loss_fn(params):
    logits, updated = linen_layer(params, statistics, images, train=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), updated['batch_stats']

  (loss, statistics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
    params
  )
  params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
  return params, statistics, loss


def linen_layer(params, statistics, images, *, train):
  x, updated = BatchNorm().apply(
    {'params': params['bn'], 'batch_stats': statistics},
    images @ params['hidden']['kernel'],
    use_running_average=not train,
    mutable=['batch_stats'],
  )
  out = params['classifier']
  with jax.numpy_rank_promotion('allow'):
    return jax.nn.relu(x) @ out['kernel'] + out['bias'], updated


def test_layer():
  """Three steps, and then an evaluation, which changes nothing."""
  page = {}
  exec(LAYER, page)
  network, nnx = page['network'], page['nnx']
  rng = np.random.default_rng(0)
  images = rng.normal(0.5, 2, (60, 784)).astype(np.float32)
  labels = np.arange(60) % 10
  params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
  statistics = nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))['bn']
  assert (statistics['mean'] == 0).all() and (statistics['var'] == 1).all()
  step = jax.jit(linen_layer_step)
  for _ in range(3):
    found = page['train_step'](network, page['optimizer'], images, labels)
    params, statistics, loss = step(params, statistics, images, labels)
    assert_close(found, loss)
  expected, _ = linen_layer(params, statistics, images, train=False)
  assert_close(network(images, train=False), expected)
  jax.tree.map(
    assert_close, nnx.to_pure_dict(nnx.state(network, nnx.Param)), params
  )
  assert_close(network.bn.mean[...], statistics['mean'])
  assert_close(network.bn.var[...], statistics['var'])


def test_network(folder):
  """Trained: logits, gradients and updated statistics are those of linen."""
  page = {}
  exec(LAYER + NETWORK, page)
  nnx, trained, file = page['nnx'], page['trained'], page['file']
  linen = page['linen']
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (6, *file.image_shape)).astype(np.float32)

  @nnx.jit
  def compute(network, images):
    def loss_fn(network):
      logits = network(images, train=True, mutable=['batch_stats']).main
      return (logits**2).mean()

    logits = network(images, train=False).main
    return logits, nnx.to_pure_dict(nnx.grad(loss_fn)(network))

  @jax.jit
  def compute_linen(variables, images):
    def loss_fn(params):
      logits, updated = linen.apply(
        {**variables, 'params': params},
        images,
        train=True,
        mutable=['batch_stats'],
      )
      return (logits.main**2).mean(), updated['batch_stats']

    logits = linen.apply(variables, images, train=False).main
    return logits, *jax.grad(loss_fn, has_aux=True)(variables['params'])

  logits, gradients, statistics = compute_linen(file.variables, images)
  found_logits, found_gradients = compute(trained, images)
  found = nnx.to_pure_dict(nnx.state(trained, nnx.BatchStat))
  assert_close(found_logits, logits)
  jax.tree.map(assert_close, found_gradients, gradients)
  jax.tree.map(assert_close, found, statistics)
  before = file.variables['batch_stats']['conv1']['bn']['mean']
  assert (found['conv1']['bn']['mean'] != before).all()


def test_csv(folder):
  exec(CSV, {})
  lines = read_metrics(folder / 'runs' / 'bn_x5' / 'metrics.jsonl')
  with open('metrics.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == len(lines) == 5
  for row, line in zip(rows, lines, strict=True):
    assert float(row['loss']) == line['loss']
    assert row == {name: str(line.get(name, '')) for name in row}


def test_wandb(folder, monkeypatch):
  """A module that records stands in for the library."""
  logged, configs = [], []

  @contextlib.contextmanager
  def init(config):
    configs.append(config)
    yield types.SimpleNamespace(
      log=lambda values, step: logged.append((step, values))
    )

  wandb = types.ModuleType('wandb')
  wandb.init = init
  monkeypatch.setitem(sys.modules, 'wandb', wandb)
  exec(WANDB, {})
  workdir = folder / 'runs' / 'bn_x5'
  assert configs == [json.loads((workdir / 'config.json').read_text())]
  assert [step for step, _ in logged] == [20] * 5
  values = {k: v for _, values in logged for k, v in values.items()}
  last = read_metrics(workdir / 'metrics.jsonl')[-1]
  assert values['test_population/accuracy'] == last['accuracy']
  assert len(values) == 10


def test_tags_of_tensorboard(folder, tmp_path):
  from tensorboardX.proto.event_pb2 import Event

  display = ProgressDisplay(20, silent=True)
  copy = Workdir(tmp_path / 'copy')
  copy.path.mkdir()
  with MetricWriter(copy, 0, display, None, tensorboard=True) as writer:
    for line in read_metrics(folder / 'runs' / 'bn_x5' / 'metrics.jsonl'):
      writer.write(line)
  (path,) = (copy.path / 'tensorboard').iterdir()
  records, tags = path.read_bytes(), []
  while records:
    length = int.from_bytes(records[:8], 'little')
    event = Event.FromString(records[12 : 12 + length])
    tags += [value.tag for value in event.summary.value]
    records = records[16 + length :]
  assert sorted(tags) == sorted(
    group + name
    for group, *names in map(str.split, TAGS.splitlines())
    for name in names
  )
