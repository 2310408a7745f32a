"""How far from the right ones may the initial weights be, with BN and without?

Section 3.3: with BN the layers' Jacobians do not depend on the scale of their
weights. Multiples of the configs' own weights, He's.

  python -m bn_repro.sweep --sweep=configs/sweeps/init_scale.py --workdir=runs/init_scale
"""

from ml_collections import ConfigDict

from configs.sweeps import lr_multipliers


def get_config(mode: str = 'mini') -> ConfigDict:
  """A twentieth to twenty times of the initial weights."""
  sweep = lr_multipliers.get_config(mode)
  del sweep.axes.multiplier
  sweep.axes.scale = ConfigDict()
  sweep.axes.scale.values = (1.0, 0.05, 0.2, 0.5, 2.0, 5.0, 20.0)
  sweep.axes.scale.set = ('model.init_scale*={}',)
  sweep.x = 'scale'
  return sweep
