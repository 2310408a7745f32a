"""Environment variables of JAX that keep a run from starting."""

import subprocess

import jax
import pytest
import support

from bn_repro import cli
from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.runtime import backend


def assert_names(raised, name):
  (problem,) = raised.value.problems
  assert name in problem and '\n' not in problem


@pytest.mark.parametrize(
  'flags, reason',
  [
    ('--xla_nonsense=1', 'Unknown flag in XLA_FLAGS: --xla_nonsense=1'),
    ('--xla_force_host_platform_device_count=abc', 'abc'),
    ('no_such_file', 'Could not open file "no_such_file"'),
  ],
)
def test_flags_that_xla_refuses(flags, reason, monkeypatch):
  """XLA itself would end the process."""
  monkeypatch.setenv('XLA_FLAGS', flags)
  with pytest.raises(UserError) as raised:
    backend.import_jax()
  assert_names(raised, f'XLA_FLAGS={flags}')
  assert reason in str(raised.value)


@pytest.mark.parametrize(
  'count, checks', [('2', 0), ('abc', 1), ('9' * 11, 1), ('2 --x', 1)]
)
def test_the_number_of_cpu_devices_costs_no_process(count, checks, monkeypatch):
  started = []

  def run(*args, **kwargs):
    started.append(args)
    return subprocess.CompletedProcess(args, 0, '', '')

  monkeypatch.setattr(subprocess, 'run', run)
  monkeypatch.setenv(
    'XLA_FLAGS', f' --xla_force_host_platform_device_count={count}'
  )
  backend.import_jax()
  assert len(started) == checks


@pytest.mark.parametrize(
  'name, value',
  [('jax_disable_jit', True), ('jax_numpy_dtype_promotion', 'strict')],
)
def test_settings_that_no_command_can_have(name, value, monkeypatch):
  monkeypatch.setenv(name.upper(), str(value))
  previous = getattr(jax.config, name)
  backend.check_settings()
  jax.config.update(name, value)
  try:
    with pytest.raises(UserError) as raised:
      cli.set_up_jax(config_lib.load('mnist:mini'))
  finally:
    jax.config.update(name, previous)
  assert_names(raised, f'{name.upper()}={value}')


def test_settings_that_no_computation_can_have(monkeypatch):
  monkeypatch.setenv('JAX_TRANSFER_GUARD', 'disallow')
  backend.check_devices()
  with jax.transfer_guard('disallow'), pytest.raises(UserError) as raised:
    backend.check_devices()
  assert_names(raised, 'JAX_TRANSFER_GUARD=disallow')


def test_nothing_is_left_behind(tmp_path):
  """The command says what is wrong in a line, and makes no directory."""
  cases = {
    'JAX_PLATFORMS': 'cuda',
    'JAX_DISABLE_JIT': '1',
    'JAX_ENABLE_X64': 'maybe',
  }
  processes = [
    support.start(
      '--config=mnist:mini', f'--workdir={tmp_path / "run"}', **{name: value}
    )
    for name, value in cases.items()
  ]
  results = support.finish(*processes)
  for result, (name, value) in zip(results, cases.items(), strict=True):
    assert result.returncode == 1
    assert result.stderr.startswith('error: ')
    assert result.stderr.count('\n') == 1, result.stderr
    assert f'{name}={value}' in result.stderr
  assert not (tmp_path / 'run').exists()
