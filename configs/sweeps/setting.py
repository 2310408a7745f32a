"""The search for the setting in which the paper's claims are tested.

At which learning rate does Inception reach its highest accuracy on validation
images of Fashion-MNIST, and how do the orderings of Fig. 2 and 3 depend on it, and on the length
of the runs? All networks of section 4.2 on both data sets: their rates are the
paper's multiples of Inception's. No run of the search is a run of the evidence.

  python -m bn_repro.sweep --sweep=setting --workdir=runs/setting

`fashion_mnist.py` and `mnist_5k.py` train at the setting that was chosen.
"""

from ml_collections import ConfigDict

from bn_repro import paper
from bn_repro.sweep.sweep import Base, Sweep

# Inception's best rate on the validation images of Fashion-MNIST, at length 1.
RATE = 0.02
# By data set: length of the runs relative to `mini`, training images to set
# aside, and the number of those that are left.
_DATA = {'mnist_5k': (1, 500, 3_500), 'fashion_mnist': (6, 3_000, 57_000)}


def trial(
  base: Base, variant: str, data: str, length: float, rate: float, seed: int
) -> ConfigDict:
  """A network on a data set.

  The learning rate decays at the same fractions of the run on both.

  Args:
    base: as for `Sweep.trial`.
    variant: name of the config.
    data: name of the data set.
    length: duration relative to the one that was chosen.
    rate: learning rate of Inception.
    seed: seed of the run.
  """
  config, inception = base(variant), base('inception')
  longer, holdout, examples = _DATA[data]
  larger = examples / _DATA['mnist_5k'][2]
  config.seed = seed
  config.data.name = data
  config.data.holdout = holdout
  for field in ('total_steps', 'log_every', 'eval_every', 'checkpoint_every'):
    config[field] = round(config[field] * longer * length)
  config.optim.learning_rate = _rounded(
    config.optim.learning_rate * rate / inception.optim.learning_rate
  )
  config.optim.decay_epochs = _rounded(
    config.optim.decay_epochs * longer * length / larger
  )
  return config


def _rounded(value: float) -> float:
  """Returns a value rounded to six digits, as in published configs."""
  return float(f'{value:g}')


def get_sweep(mode: str = 'mini') -> Sweep:
  """Four base rates and two lengths, with a seed that no other run has."""
  del mode
  return Sweep(
    axes={
      'variant': paper.FIG_3,
      'data': tuple(_DATA),
      'length': (1.0, 0.25),
      'rate': (0.02, 0.01, 0.04, 0.005),
      'seed': (100,),
    },
    trial=trial,
    x='rate',
    repeat='seed',
  )
