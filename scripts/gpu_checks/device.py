"""The device that is checked, in this process."""

import os
from typing import Any

from bn_repro import cli
from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.runtime import backend

# By platform, what JAX may start: float64 is computed on the CPU.
PLATFORMS = {'gpu': 'cuda,cpu', 'cpu': 'cpu'}


def start(platform: str) -> Any:
  """Sets up JAX, and returns the device to check.

  Args:
    platform: a key of `PLATFORMS`; `JAX_PLATFORMS` has its value.

  Raises:
    UserError: if JAX has no such device.
  """
  backend.import_jax()
  import jax

  try:
    device = jax.devices()[0]
    reason = f'JAX computes on {device.platform}'
  except RuntimeError as error:
    device, reason = None, ' '.join(str(error).split())[:200]
  if device is None or device.platform != platform:
    raise UserError(
      f'--platform={platform}: JAX finds no such device ({reason}). '
      '--platform=cpu tries the checks where there is no GPU.'
    )
  cli.set_up_jax(config_lib.load('bn_x5:mini'))
  return device


def facts(platform: str) -> dict[str, Any]:
  """Returns what the device is, and the version of its runtime."""
  device = start(platform)
  return {
    'kind': device.device_kind,
    'runtime': ' '.join(device.client.platform_version.split()),
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
  }
