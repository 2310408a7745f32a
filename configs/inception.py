"""Inception (section 4.2): the network without batch normalization.

Paper: 72.2 % of the ImageNet validation images after 31.0 million steps of 32.

  python -m bn_repro.main --config=inception:mini --workdir=runs/inception

`full` (the default) is the paper's experiment on ImageNet. `mini` trains the
same network, an eighth as wide, on 3,500 digits of 32x32 pixels, and takes a
minute or two on two cores.

This file sets every field; the other configs change some of them. "Our choice"
marks a value that the paper does not give.
"""

from ml_collections import ConfigDict


def get_config(mode: str = 'full') -> ConfigDict:
  """Returns the values of all fields in the mode `full` or `mini`."""
  config = ConfigDict()

  # Seed of the initial weights, the order of examples, crops, distortions and
  # dropout.
  config.seed = 0
  # Images per step, over all devices. The paper's replicas take 32 each.
  config.batch_size = 32
  # Duration of the run, in steps or in epochs; the other one is 0. The paper
  # reports 31M steps of 32 to the best accuracy.
  config.total_steps = 31_000_000
  config.total_epochs = 0.0
  # Steps per call of the compiled program. The duration and the intervals are
  # multiples of it. More than 1 pays off for networks so small that the call
  # takes as long as the step.
  config.steps_per_call = 1

  # Steps between lines of training metrics, between evaluations, and between
  # checkpoints. Our choice: the paper's curves have no marks.
  config.log_every = 1_000
  config.eval_every = 100_000
  config.checkpoint_every = 20_000
  # The newest checkpoints are kept, older ones deleted.
  config.checkpoints_to_keep = 3
  # Split to evaluate at each interval: train, validation or test. The test
  # images, where a data set has some, are also evaluated after the last step.
  config.eval_split = 'validation'
  # A process without a step for this many times the median duration of a step,
  # and for at least five minutes, prints its stack traces and exits with 75: the
  # same command resumes the run. 0 turns this off. Our choice.
  config.stuck_after = 100.0
  # Also write TensorBoard event files into the workdir.
  config.tensorboard = False
  # Steps to trace with XLA's profiler into the workdir, and the first of them;
  # 0 traces none. TensorBoard's XProf displays the trace.
  config.profile_steps = 0
  config.profile_first_step = 100
  # A loss above this ends the run as diverged. Our choice: 15 times ln(1000).
  config.divergence_loss = 100.0
  # Workdir of another run, whose newest checkpoint gives the initial parameters
  # and statistics, or of `scripts/import_weights.py`; '' initializes them.
  config.init_from = ''

  config.data = ConfigDict()
  # imagenet2012, mnist, fashion_mnist, mnist_5k (5,000 digits that come with
  # pip), imagenet_stand_in (of `scripts/make_stand_in.py`), imagenet_v2 (for
  # `evaluate`), folder, npz (docs/data.md) or synthetic.
  config.data.name = 'imagenet2012'
  # Folder of the data set, or the file of npz; '' is its usual place. mnist_5k
  # and synthetic have none.
  config.data.data_dir = ''
  # Height and width of the images, in pixels. Those of ImageNet and of a folder
  # are cropped to it, those in memory are padded.
  config.data.image_size = 224
  # Fifth of mnist_5k that is the split `test`: 0 to 4. Five runs, one per fold,
  # test each digit once. Other data sets have a test split of their own: 0.
  config.data.fold = 0
  # Training images to set aside as the split `validation`, always the same ones.
  # With 0, `validation` is the data set's own split of that name, if it has one.
  config.data.holdout = 0
  # Order of training examples. none: each epoch permutes the shards; the order
  # within a shard is fixed (section 4.2.1 improves on this). within_shard: each
  # epoch also permutes the examples within each shard. global: each epoch
  # permutes all examples.
  config.data.shuffle = 'none'
  # Number of shards of the training examples; tfds writes ImageNet in 1,024.
  config.data.num_shards = 1_024
  # Training images to make, once, by small affine distortions of the given
  # ones; 0 trains on the given ones.
  config.data.distorted_copies = 0
  # Set pixels to black or white, with the threshold at half of the range.
  config.data.binarize = False
  # Photometric distortions: none, reduced or full. The paper gives no
  # strengths; ours are TF-Slim's fast and slow modes.
  config.data.distortion = 'full'
  # Box of an image that evaluation sees. square: the central square whose side
  # is 224/256 of the shorter side (GoogLeNet). proportional: the central 87.5 %
  # of each side, made square (TF-Slim).
  config.data.evaluation_box = 'square'
  # Pixel values that the network sees. symmetric: RGB in [-1, 1], as in TF-Slim;
  # our choice. caffe: BGR in [0, 255] minus the mean, as in Caffe's BN-Inception.
  # torchvision: RGB in [0, 1] minus the mean, over the standard deviation.
  config.data.normalization = 'symmetric'
  # Threads per process that decode images; 0 means one per core. Python's lock
  # makes more than about eight useless.
  config.data.num_threads = 0
  # Additional processes that decode images; 0 decodes in the training process.
  config.data.num_workers = 0
  # An image that cannot be decoded is replaced by the next one. If the fraction
  # of replaced images in a log interval or an evaluation is above this, the run
  # fails. Our choice.
  config.data.max_replaced = 0.01

  config.model = ConfigDict()
  # inception; mlp (section 4.1), which uses only width, nonlinearity, init_std,
  # init_scale and dtype; or, for tests, inception_tiny, with the modules 3a and
  # 3c alone.
  config.model.name = 'inception'
  # Standard deviation of the initial Gaussian weights. 0 means He's
  # initialization, and 0.01 in the classifier. Our choice.
  config.model.init_std = 0.0
  # Factor on the initial weights.
  config.model.init_scale = 1.0
  # Output channels of 4c and 4d: Fig. 5 says 576 and lists filters that add up
  # to 608. Our choice follows TF-Slim and the Torch port of that time.
  config.model.reading = '576'
  # First convolution: separable with depth multiplier 8 (appendix), or plain.
  config.model.stem = 'separable'
  # Kernel size of the first convolution, and whether max pooling follows it.
  config.model.stem_kernel = 7
  config.model.stem_pool = True
  # Padding of strided convolutions: as in TensorFlow (same) or Caffe (torch).
  config.model.padding = 'same'
  # Factor on the number of filters in each layer.
  config.model.width = 1.0
  # relu or sigmoid.
  config.model.nonlinearity = 'relu'
  # Local response normalization in the stem, as in GoogLeNet.
  config.model.lrn = True
  # Fraction of the classifier's inputs to drop, as in GoogLeNet.
  config.model.dropout_rate = 0.4
  # One auxiliary classifier after 4d, and the weight of its loss (GoogLeNet).
  # The paper mentions none, so it is off, but the network has the paper's 13.6M
  # parameters only with one.
  config.model.aux_head = False
  config.model.aux_loss_weight = 0.3
  # Compute type: float32, bfloat16, float64, or auto, which is bfloat16 on TPU
  # and GPU and float32 on CPU. Parameters, statistics and the loss have at least
  # float32.
  config.model.dtype = 'auto'

  config.bn = ConfigDict()
  config.bn.enabled = False
  # Statistics of each activation, not of each channel, in the convolutions of
  # the last module, 5b (section 4.2.3; which layers they are is our choice).
  config.bn.per_activation = False
  # Examples that share statistics. global: the batch. device: the images on each
  # device. group: each `virtual_batch_size` images; 32 reproduces the paper's
  # replicas.
  config.bn.statistics = 'global'
  config.bn.virtual_batch_size = 32
  # Weight of the old value in the moving averages. Our choice, after TF-Slim.
  config.bn.momentum = 0.9997
  # Added to the variance. Our choice, after TF-Slim.
  config.bn.epsilon = 1e-3
  # Training batches whose statistics Algorithm 2 averages before an evaluation;
  # 0 evaluates with moving averages only. Our choice.
  config.bn.population_batches = 100

  config.optim = ConfigDict()
  # Initial learning rate at batch size 32 (section 4.2.2); it is multiplied by
  # `batch_size / 32`.
  config.optim.learning_rate = 0.0015
  # GoogLeNet's; the paper gives none.
  config.optim.momentum = 0.9
  # L2 regularization of the weights, not of biases, scales and shifts. Our
  # choice, after Caffe's GoogLeNet; BN-x5's fifth is then TF-Slim's value.
  config.optim.weight_decay = 2e-4
  # Every `decay_epochs` the learning rate is multiplied by `decay_rate`
  # (GoogLeNet's schedule).
  config.optim.decay_rate = 0.96
  config.optim.decay_epochs = 8.0
  # Weight of the old value in Polyak's average of the parameters, which
  # evaluations use; 0 turns it off. GoogLeNet averaged; the paper does not say.
  config.optim.polyak_decay = 0.0

  if mode == 'mini':
    _make_mini(config)
  return config


def _make_mini(config: ConfigDict) -> None:
  """CPU scale, all our choice: the whole table, an eighth as wide, on digits.

  The other configs train half as long. `configs/sweeps/setting.py` is the search
  for the learning rate and the length.
  """
  config.total_steps = 1000
  config.log_every = 20
  config.eval_every = 20
  config.checkpoint_every = 100

  config.data.name = 'mnist_5k'
  config.data.image_size = 32
  config.data.holdout = 500
  config.data.num_shards = 20
  # Gray digits have no colors to distort.
  config.data.distortion = 'none'

  config.model.width = 0.125
  # 32 pixels leave no room for a fourth halving before the first module, and a
  # depthwise convolution takes three times as long on a CPU.
  config.model.stem = 'plain'
  config.model.stem_kernel = 5
  config.model.stem_pool = False

  # A longer average would still depend on its start when the run ends.
  config.bn.momentum = 0.9
  config.bn.population_batches = 40

  config.optim.learning_rate = 0.02
  # Over the run the rate falls to 0.23 of its initial value. Those of BN-x5 and
  # BN-x30, which decay 6 times faster, fall to 0.011 in half as many steps; in the
  # paper's 6 million steps BN-x30's falls to 0.010.
  config.optim.decay_rate = 0.85
  config.optim.decay_epochs = 0.96
