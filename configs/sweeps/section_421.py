"""Each item of section 4.2.1 by itself: added to BN-Baseline, taken from BN-x5.

The paper changes seven things at once. Which of them does it?

  python -m bn_repro.sweep --sweep=configs/sweeps/section_421.py --workdir=runs/section_421
"""

from ml_collections import ConfigDict

from bn_repro import config as config_lib
from configs import bn_baseline, bn_x5
from configs.sweeps import lr_multipliers

# The fields of each item.
_ITEMS = {
  'rate': ('optim.learning_rate',),
  'dropout': ('model.dropout_rate',),
  'l2': ('optim.weight_decay',),
  'decay': ('optim.decay_rate', 'optim.decay_epochs'),
  'lrn': ('model.lrn',),
  'shuffle': ('data.shuffle',),
  'distortion': ('data.distortion',),
}


def get_config(mode: str = 'mini') -> ConfigDict:
  """BN-Baseline, with each item; then BN-x5, without each."""
  sweep = lr_multipliers.get_config(mode)
  before = config_lib.flatten(bn_baseline.get_config(mode))
  after = config_lib.flatten(bn_x5.get_config(mode))
  # As long as one another, so that both ends can be compared.
  sweep.overrides = (f'total_steps={before["total_steps"]}',)
  del sweep.axes.variant, sweep.axes.multiplier

  nets: dict[str, tuple[str, ...]] = {}
  for start, word, values in (
    ('bn_baseline', 'with', after),
    ('bn_x5', 'without', before),
  ):
    nets[start] = (f'config={start}',)
    for item, fields in _ITEMS.items():
      # Grey digits have no colours to distort: `mini` leaves that item out.
      if any(before[field] != after[field] for field in fields):
        nets[f'{word}_{item}'] = (
          f'config={start}',
          *(f'{field}={values[field]}' for field in fields),
        )
  sweep.axes.net = ConfigDict()
  sweep.axes.net.values = tuple(nets)
  sweep.axes.net.set = ConfigDict(nets)
  sweep.x = 'net'
  return sweep
