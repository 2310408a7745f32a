"""Eight CPU devices, strict shapes, and no skip that nobody knows of."""

import os
from pathlib import Path
import types

os.environ['JAX_PLATFORMS'] = 'cpu'
# Small programs are cached as well; commands that tests start inherit this.
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax
import pytest
import support

# XLA reads them when it is first used. Tests compile more than they compute: it
# optimizes as little as it can.
os.environ['XLA_FLAGS'] = ' '.join(
  (
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0',
    support.QUICK_COMPILATION,
  )
)
jax.config.update('jax_numpy_rank_promotion', 'raise')

ALLOWED_SKIPS = Path(__file__).with_name('allowed_skips.txt')


@pytest.fixture(autouse=True)
def _settings_of_jax():
  """Each test leaves the settings of JAX as they were.

  A command turns float64 on for its process, which here is that of later tests.
  """
  before = dict(jax.config.values)
  yield
  jax.config.update('jax_enable_x64', before['jax_enable_x64'])
  after = jax.config.values
  changed = {name: after[name] for name in after if after[name] != before[name]}
  assert not changed


@pytest.fixture
def x64():
  """Float64 for the length of a test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='session')
def _bucket_server():
  """A server of buckets behind a proxy, which this process uses as Google's."""
  import bucket_proxy
  import bucket_server

  from bn_repro import files
  from bn_repro.runtime import buckets

  server = bucket_server.Server()
  proxy = bucket_proxy.Proxy(server.server_address)
  address = f'http://127.0.0.1:{proxy.server_address[1]}'
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('STORAGE_EMULATOR_HOST', address)
    # The client opens its session at its first request, and several of them if
    # that is made by several threads at once.
    server.store.buckets = {'bucket': {}}
    buckets.find(files.parse_place('--workdir', 'gs://bucket/run'))
    yield server, proxy


@pytest.fixture
def bucket(_bucket_server):
  """An empty bucket; `bucket_proxy` says how requests can be made to fail.

  Attributes:
    path: 'gs://bucket'.
    objects: the objects, by name; each a dict, with its `data`.
    denied: set of the permissions that nobody has.
    proxy: the `bucket_proxy.Proxy` that all requests pass.
  """
  server, proxy = _bucket_server
  store = server.store
  store.buckets, store.denied = {'bucket': {}}, set()
  proxy.reset()
  yield types.SimpleNamespace(
    path='gs://bucket',
    objects=store.buckets['bucket'],
    denied=store.denied,
    proxy=proxy,
  )
  proxy.reset()


@pytest.fixture(scope='session')
def trained_workdir(tmp_path_factory):
  """The workdir of a small network with BN, after 20 steps on digits."""
  folder = tmp_path_factory.mktemp('trained') / 'bn_x5'
  said = support.run(
    '--config=bn_x5:mini',
    f'--workdir={folder}',
    support.TINY,
    '--config.total_steps=20',
    '--config.eval_every=20',
    '--config.log_every=20',
    '--config.bn.population_batches=4',
  )
  assert said.returncode == 0, said.stderr
  return folder


def pytest_addoption(parser):
  parser.addoption(
    '--strict-skips',
    action='store_true',
    help='fail if a test is skipped for a reason not in allowed_skips.txt',
  )


def _unknown_skips(terminal):
  allowed = set(ALLOWED_SKIPS.read_text().splitlines())
  for report in terminal.stats.get('skipped', ()):
    reason = report.longrepr[2].removeprefix('Skipped: ')
    if reason not in allowed:
      yield f'{report.nodeid}: skipped for a reason not allowed: {reason}'


def pytest_terminal_summary(terminalreporter, config):
  if config.getoption('--strict-skips'):
    for line in _unknown_skips(terminalreporter):
      terminalreporter.write_line(line, red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
  terminal = session.config.pluginmanager.get_plugin('terminalreporter')
  strict = session.config.getoption('--strict-skips')
  if strict and terminal is not None and any(_unknown_skips(terminal)):
    session.exitstatus = 1
