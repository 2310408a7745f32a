"""What the quickstart trains: Fig. 1, the five variants and two controls.

  python -m bn_repro.sweep --sweep=quickstart --workdir=runs/quickstart

As a sweep, as many runs are trained at once as there are cores: networks as small
as these do not get faster on more than one.
"""

from ml_collections import ConfigDict

from bn_repro.sweep.sweep import Base, Sweep
from configs.sweeps import setting


def get_sweep(mode: str = 'mini') -> Sweep:
  """Every config once."""
  del mode

  def trial(base: Base, variant: str, seed: int) -> ConfigDict:
    config = base(variant)
    if config.model.name == 'mlp':
      # The first 15,000 of the 50,000 steps show what Fig. 1 shows.
      config.total_steps = 15_000
      config.seed = seed
      return config
    # Half the steps of the study. With BN, an evaluation takes as long as 25.
    config = setting.trial(base, variant, 'mnist_5k', 0.5, setting.RATE, seed)
    config.eval_every = 25
    return config

  variants = ('mnist', 'bn_mnist', 'inception', 'bn_baseline', 'bn_x5')
  controls = ('inception_sigmoid', 'inception_x5')
  # BN-x30 has the program of BN-x5, which is compiled by the time it starts.
  return Sweep(
    axes={
      'variant': (*variants, 'bn_x5_sigmoid', *controls, 'bn_x30'),
      'seed': (0,),
    },
    trial=trial,
    x='variant',
    repeat='seed',
  )
