"""Batches of 32 to 512, the rate scaled linearly: is an image an image?

All runs see as many images, and decay the rate after as many. The rate in a
config is that for a batch of 32; 64 images train with twice of it, as CNTK
scaled it.

  python -m bn_repro.sweep --sweep=configs/sweeps/batch_size.py --workdir=runs/batch_size
"""

from ml_collections import ConfigDict

from configs.sweeps import lr_multipliers

_STEPS = ('total_steps', 'log_every', 'eval_every', 'checkpoint_every')


def get_config(mode: str = 'mini') -> ConfigDict:
  """Multiples of the batch, as many times fewer steps."""
  sweep = lr_multipliers.get_config(mode)
  # Intervals that can be divided by 16.
  if mode == 'mini':
    sweep.overrides = (
      'total_steps=512',
      'log_every=32',
      'eval_every=32',
      'checkpoint_every=128',
    )
  else:
    sweep.overrides = ('log_every=1600',)
  sweep.axes.variant.values = ('inception', 'bn_baseline', 'bn_x5')
  del sweep.axes.multiplier
  sweep.axes.larger = ConfigDict()
  sweep.axes.larger.values = (1, 2, 4, 8, 16)
  sweep.axes.larger.set = (
    'batch_size*={}',
    *(f'{steps}/={{}}' for steps in _STEPS),
  )
  sweep.x = 'larger'
  return sweep
