"""Section 4.2.1, one item at a time: which of the seven changes matters?

The paper makes all of them at once. Here each is added to BN-Baseline, and each
is taken from BN-x5.

  python -m bn_repro.sweep --sweep=configs/sweeps/section_421.py --workdir=runs/section_421
"""

from typing import Any

from ml_collections import ConfigDict

from bn_repro import config_fields
from bn_repro.sweep.sweep import Base, Sweep
from configs import bn_baseline, bn_x5

# The fields of each item.
_ITEMS = {
  'higher_rate': ('optim.learning_rate',),
  'removal_of_dropout': ('model.dropout_rate',),
  'smaller_l2': ('optim.weight_decay',),
  'faster_decay': ('optim.decay_rate', 'optim.decay_epochs'),
  'removal_of_lrn': ('model.lrn',),
  'better_shuffling': ('data.shuffle',),
  'weaker_distortion': ('data.distortion',),
}


def get_sweep(mode: str = 'mini') -> Sweep:
  """BN-Baseline with each item, and BN-x5 without each."""
  before = config_fields.flatten(bn_baseline.get_config(mode))
  after = config_fields.flatten(bn_x5.get_config(mode))
  # The config that each net starts from, and the fields that it changes.
  nets: dict[str, tuple[str, dict[str, Any]]] = {}
  for start, word, values in (
    ('bn_baseline', 'baseline_with', after),
    ('bn_x5', 'x5_without', before),
  ):
    nets[start] = start, {}
    for item, fields in _ITEMS.items():
      # `mini` leaves out the distortion: gray digits have no colors to distort.
      if any(before[field] != after[field] for field in fields):
        changes = {field: values[field] for field in fields}
        nets[f'{word}_{item}'] = start, changes

  def trial(base: Base, net: str, seed: int) -> ConfigDict:
    if net not in nets:
      raise ValueError(f"no net '{net}'. The nets are {', '.join(nets)}")
    start, changes = nets[net]
    config = base(start)
    config.update_from_flattened_dict(changes)
    config.seed = seed
    return config

  return Sweep(
    axes={'net': tuple(nets), 'seed': (0, 1)},
    trial=trial,
    x='net',
    repeat='seed',
    # Both nets train equally long, so that they can be compared.
    defaults={'total_steps': before['total_steps']},
    compared_with={
      net: start for net, (start, changes) in nets.items() if changes
    },
  )
