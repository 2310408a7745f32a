"""How far from the right one may the initial weights be, with BN and without?

Section 3.3: BN makes the layers' Jacobians independent of the scale of their
weights. The standard deviation is that of all weights, the classifier's included;
the configs' own is He's, which differs by layer.

  python -m bn_repro.sweep --sweep=configs/sweeps/init_scale.py --workdir=runs/init_scale
"""

from ml_collections import ConfigDict

from configs.sweeps import lr_multipliers


def get_config(mode: str = 'mini') -> ConfigDict:
  """Standard deviations over three decades, at the rate of the config."""
  sweep = lr_multipliers.get_config(mode)
  del sweep.axes.multiplier
  sweep.axes.std = ConfigDict()
  sweep.axes.std.values = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
  sweep.axes.std.set = ('model.init_std={}',)
  sweep.x = 'std'
  return sweep
