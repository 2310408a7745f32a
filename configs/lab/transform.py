"""Is it enough to normalize each unit, where whitening is meant?"""

from ml_collections import ConfigDict

from configs.lab import drift


def get_config(mode: str) -> ConfigDict:
  """The networks of `drift.py`, trained as there."""
  return drift.get_config(mode)
