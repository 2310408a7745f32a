"""Starts JAX, and says which environment variables keep it from starting."""

from collections.abc import Iterator
import contextlib
import importlib.util
import os
from pathlib import Path
import re
import subprocess
import sys

from bn_repro.errors import UserError

# Linux lists the devices of the PCI bus here.
_PCI_DEVICES = Path('/sys/bus/pci/devices')
_GOOGLE = '0x1ae0'
# gVNIC, the network card of Google's VMs.
_NETWORK_CARD = '0x0042'

# Settings of JAX that the commands need: they compile ahead of time, and add
# arrays of different types.
_NEEDED = {
  'jax_disable_jit': False,
  'jax_numpy_dtype_promotion': 'standard',
}

# The flags of a machine without accelerators, which need no check.
_COMMON_XLA_FLAGS = re.compile(
  r'\s*--xla_force_host_platform_device_count=[0-9]{1,4}\s*'
)
# Parses XLA_FLAGS, and starts no device.
_PARSE_XLA_FLAGS = 'from jaxlib import xla_client; xla_client.CompileOptions()'


def has_tpu() -> bool:
  """Whether the PCI bus has a device of Google's that is no network card."""
  for vendor in _PCI_DEVICES.glob('*/vendor'):
    if vendor.read_text().strip() == _GOOGLE:
      device = (vendor.parent / 'device').read_text().strip()
      if device != _NETWORK_CARD:
        return True
  return False


def import_jax() -> None:
  """Imports JAX. It looks for a TPU only on a machine that has one.

  Where only `libtpu` is installed, the search would take seconds and print
  warnings.

  Raises:
    UserError: if a variable of the environment has a value that JAX refuses.
  """
  if importlib.util.find_spec('libtpu') is not None and not has_tpu():
    others = 'cuda,cpu' if os.path.exists('/dev/nvidiactl') else 'cpu'
    os.environ.setdefault('JAX_PLATFORMS', others)
  _check_xla_flags()
  with _explained():
    import jax  # noqa: F401


def check_devices() -> None:
  """Computes with the devices, which JAX starts at its first computation.

  Raises:
    UserError: if JAX cannot. It has the variables of JAX in the environment.
  """
  import jax
  import numpy as np

  with _explained():
    jax.device_get(jax.jit(lambda x: x + 1)(np.zeros(1, np.float32)))


def check_settings() -> None:
  """Checks the settings of JAX under which the commands cannot run.

  Raises:
    UserError: if an environment variable has changed one of them.
  """
  import jax

  settings = jax.config
  problems = [
    f'{name.upper()}={os.environ.get(name.upper())}: this command needs '
    f'{name}={needed}. Unset the variable.'
    for name, needed in _NEEDED.items()
    if getattr(settings, name) != needed
  ]
  if problems:
    raise UserError(*problems)


def _check_xla_flags() -> None:
  """Raises if XLA refuses XLA_FLAGS, before it ends this process for that."""
  flags = os.environ.get('XLA_FLAGS')
  if not flags or _COMMON_XLA_FLAGS.fullmatch(flags):
    return
  parsed = subprocess.run(
    [sys.executable, '-P', '-c', _PARSE_XLA_FLAGS],
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    check=False,
  )
  # The severity, the time and the place in the source stand before a message.
  message = re.search(r'^[EF]\d{4} .*?\] (.*)', parsed.stderr, re.MULTILINE)
  if parsed.returncode and message:
    reason = message[1].rstrip('.')
    raise UserError(
      f'XLA_FLAGS={flags}: {reason}. Correct or unset the variable.'
    )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
  """Turns an error of JAX into a `UserError` that names what may cause it."""
  try:
    yield
  except Exception as error:  # The type depends on the variable.
    reason = ' '.join(str(error).split())[:300] or type(error).__name__
    switches = ' '.join(
      f'{name}={value}'
      for name, value in sorted(os.environ.items())
      if name.startswith(('JAX_', 'XLA_', 'LIBTPU_', 'CUDA_VISIBLE_DEVICES'))
      and name != 'JAX_COMPILATION_CACHE_DIR'
    )
    if switches:
      raise UserError(
        f'JAX cannot start with {switches}: {reason}. Correct or unset these '
        'variables, or install JAX for these devices.'
      ) from error
    raise UserError(
      f'JAX cannot start: {reason}. Check its installation and the devices.'
    ) from error
