"""BN-Baseline (section 4.2.2): Inception with BN before each nonlinearity.

Paper: 72.2 % after 13.3 million steps, fewer than half of Inception's;
best 72.7 %.

  python -m bn_repro.main --config=bn_baseline --workdir=runs/bn_baseline
"""

from ml_collections import ConfigDict

from configs import inception


def get_config(mode: str = 'full') -> ConfigDict:
  """Inception with batch normalization; nothing else changes."""
  config = inception.get_config(mode)
  config.bn.enabled = True
  # Our choice: beyond the paper's 13.3M, and less than half of Inception's.
  config.total_steps = 15_000_000 if mode == 'full' else 500
  return config
