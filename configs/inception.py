"""Inception (section 4.2): the network without batch normalisation.

Paper: 72.2 % of the ImageNet validation images after 31.0 million steps of 32.

  python -m bn_repro.main --config=configs/inception.py:mini --workdir=runs/inception

`full` (the default) is the paper's experiment on ImageNet; `mini` the same
network, an eighth as wide, on 4,000 digits of 32x32 pixels, in a minute or two
on two cores. This file is complete: every field of every config stands here,
and the other configs change some of them. "Our choice" marks what the paper
does not give.
"""

from ml_collections import ConfigDict


def get_config(mode: str = 'full') -> ConfigDict:
  """Every field, with the values of the mode `full` or `mini`."""
  config = ConfigDict()

  config.seed = 0
  # Images in a step, over all devices. The paper's replicas take 32 each.
  config.batch_size = 32
  # Steps of `batch_size` images; 0 takes the duration from `total_epochs`.
  # The paper gives 31M steps of 32 up to the best accuracy.
  config.total_steps = 31_000_000
  config.total_epochs = 0.0
  # Steps in one call of the compiled program; intervals are multiples of it.
  # More than 1 pays where a step takes about as long as calling it.
  config.steps_per_call = 1

  # Intervals, in steps. Our choice: the paper's curves have no marks.
  config.log_every = 1_000
  config.eval_every = 100_000
  config.checkpoint_every = 20_000
  config.checkpoints_to_keep = 3
  # What is evaluated at each interval; a data set's test images, where it has
  # any beside these, are evaluated once, after the last step.
  config.eval_split = 'validation'
  # A process that makes no step for so many times the median of one (and for
  # five minutes) writes down where it hangs and ends, to be started again; 0
  # never does. Our choice.
  config.stuck_after = 100.0
  # Also write TensorBoard event files into the workdir.
  config.tensorboard = False
  # Steps to trace with XLA's profiler into the workdir, and the first of them;
  # TensorBoard's XProf shows them. 0 traces none.
  config.profile_steps = 0
  config.profile_first_step = 100
  # A loss above this ends the run as diverged. Our choice: 15 times ln(1000).
  config.divergence_loss = 100.0
  # Start from the parameters and statistics of another run's newest checkpoint.
  config.init_from = ''

  config.data = ConfigDict()
  config.data.name = 'imagenet2012'
  # Where the data lie; '' looks in the usual places.
  config.data.data_dir = ''
  # Digits are padded to a square of this size, ImageNet is cropped to it.
  config.data.image_size = 224
  # Training images set aside, a fixed set, for `validation`. 0 where the data
  # set has validation images of its own.
  config.data.holdout = 0
  # none: shards in a new order each epoch, examples of a shard never (paper
  # sec. 4.2.1: what the within-shard shuffling of BN-x5 replaces).
  config.data.shuffle = 'none'
  # Shards that the training images are cut into; tfds makes as many of
  # ImageNet.
  config.data.num_shards = 1_024
  # Training images to make from those there are by small affine distortions,
  # once; 0 takes them as they are.
  config.data.distorted_copies = 0
  # Make pixels black or white (after that), at half of the range.
  config.data.binarize = False
  # Photometric distortions: none, reduced or full. The paper gives no
  # strengths; ours are TF-Slim's fast and slow modes.
  config.data.distortion = 'full'
  # Threads that decode images, in each process; 0 is one a core. Python's lock
  # keeps more than some eight from being of use.
  config.data.num_threads = 0
  # Processes that decode images besides; 0 decodes in the training process.
  config.data.num_workers = 0
  # Images that cannot be decoded are replaced by their neighbours. A greater
  # share of them in a log interval or an evaluation ends the run. Our choice.
  config.data.max_replaced = 0.01

  config.model = ConfigDict()
  # inception, or mlp (section 4.1), for which width, nonlinearity, init_std,
  # init_scale and dtype matter alone.
  config.model.name = 'inception'
  # Standard deviation of the Gaussian weights; 0 takes He's, and 0.01 for the
  # classifier. Our choice: the paper gives none.
  config.model.init_std = 0.0
  # Multiplies the initial weights.
  config.model.init_scale = 1.0
  # Fig. 5 contradicts itself at 4c and 4d: 576 or 608 channels. Our choice: as
  # TF-Slim and the Torch port of the authors' time.
  config.model.reading = '576'
  # First convolution: separable with depth multiplier 8 (appendix), or plain.
  config.model.stem = 'separable'
  # Window of the first convolution, and whether a max pool follows it.
  config.model.stem_kernel = 7
  config.model.stem_pool = True
  # Pad strided convolutions as TensorFlow (same) or as Caffe does (torch).
  config.model.padding = 'same'
  # Multiplies every number of filters.
  config.model.width = 1.0
  config.model.nonlinearity = 'relu'
  config.model.lrn = True
  config.model.dropout_rate = 0.4
  # One auxiliary classifier after 4d, and its share in the loss (GoogLeNet).
  # The paper does not mention one, but 13.6M parameters need it.
  config.model.aux_head = False
  config.model.aux_loss_weight = 0.3
  # Compute type: float32, bfloat16 or float64; auto is bfloat16 on TPU and GPU
  # and float32 on CPU. Statistics, the loss and the parameters are never below
  # float32.
  config.model.dtype = 'auto'

  config.bn = ConfigDict()
  config.bn.enabled = False
  # Which examples share statistics: the global batch, each device's share, or
  # groups of `virtual_batch_size` (32 is what the paper's replicas did).
  config.bn.statistics = 'global'
  config.bn.virtual_batch_size = 32
  # Share of the old running average. Our choice, after TF-Slim.
  config.bn.momentum = 0.9997
  # Our choice, after TF-Slim: the paper leaves it open.
  config.bn.epsilon = 1e-3
  # Training batches that Algorithm 2 averages statistics over before an
  # evaluation; 0 evaluates with moving averages alone. Our choice.
  config.bn.population_batches = 100

  config.optim = ConfigDict()
  # For batches of 32; `batch_size / 32` times this is applied.
  config.optim.learning_rate = 0.0015
  # GoogLeNet's; the paper gives none.
  config.optim.momentum = 0.9
  # L2 on weights only. Our choice, after Caffe's GoogLeNet; a fifth of it is
  # TF-Slim's value for this network.
  config.optim.weight_decay = 2e-4
  # Times `decay_rate` every `decay_epochs` (GoogLeNet's schedule).
  config.optim.decay_rate = 0.96
  config.optim.decay_epochs = 8.0
  # Share of the old average in Polyak averaging of the parameters; 0 is off.
  # GoogLeNet used it, this paper is silent.
  config.optim.polyak_decay = 0.0

  if mode == 'mini':
    _make_mini(config)
  return config


def _make_mini(config: ConfigDict) -> None:
  """CPU scale, all our choice: the whole table, an eighth as wide, on digits.

  The base rate is a prototype's, in which the net without BN trained well at
  it; `scripts/study.py` chooses one by validation, on more images.
  """
  config.total_steps = 500
  config.log_every = 25
  config.eval_every = 25
  config.checkpoint_every = 100

  config.data.name = 'mnist_5k'
  config.data.image_size = 32
  config.data.holdout = 500
  config.data.num_shards = 20
  # Grey digits have no colours to distort.
  config.data.distortion = 'none'

  config.model.width = 0.125
  # 32 pixels leave no room for a fourth halving before the first module, and a
  # depthwise convolution takes three times as long on a CPU.
  config.model.stem = 'plain'
  config.model.stem_kernel = 5
  config.model.stem_pool = False

  # A short run is over before a longer average has arrived.
  config.bn.momentum = 0.9
  config.bn.population_batches = 40

  config.optim.learning_rate = 0.02
  config.optim.decay_rate = 0.85
  config.optim.decay_epochs = 1.2
