"""Measurements, each as ratios within one run: medians of interleaved rounds.

  python scripts/benchmark.py loop

loop   images per second of `main` in `mini` between evaluations, as a share of
       a bare loop that calls the same compiled step on a batch already on the
       device.
fig1   time of both nets of Fig. 1, 50,000 steps and 200 evaluations each, over
       that of the bare steps in one `lax.scan`.
bn     time of a BN layer, forward and forward + backward, beside those of flax
       (both of its variances) and, where it is installed, of PyTorch.
checkpoint
       time for which saving a checkpoint holds up the loop, as a share of a
       step of BN-x5 at full width and 224 pixels, 8 images.
devices
       accuracy of BN-x5 in `mini`, float32, on one fake CPU device and on
       eight, for three seeds; a round is 100 of its steps.
distortion
       time of distorting and normalising a batch, as a share of the whole step
       of BN-x5 and Inception at full width and 224 pixels, 8 images.
input  training images of ImageNet's size a second of a core: ours, tf.data as
       the Flax ImageNet example has it, Pillow in worker processes, and
       decoding alone; and how near each comes to antialiased bicubic resizing.
       It makes the environment of `scripts/prepare_imagenet.sh`, for tf.data.
stream seconds from a cold start to the first batch of 256 on an index of
       ImageNet's size, and the growth of resident memory from the 1,000th to
       the 10,000th batch. Its images are tiny and take 3 GB of disk meanwhile.
step   time of a whole step of BN-Baseline in `mini` beside the same network
       with flax's BN, and without BN.
"""

import argparse
from collections.abc import Callable, Mapping
import contextlib
import functools
import io
import itertools
import json
import math
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bn_repro import cli
from bn_repro import config as config_lib
from bn_repro.data import datasets

# The sizes of conv2_reduce, 3a and 4a at 224 pixels.
BN_SHAPES = ((32, 56, 56, 64), (32, 28, 28, 192), (32, 14, 14, 576))


def seconds(function: Callable[[], Any]) -> float:
  """How long a call takes."""
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def interleaved(
  candidates: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
  """What each candidate returns in each round, after one round to warm up."""
  for candidate in candidates.values():
    candidate()
  results: dict[str, list[float]] = {name: [] for name in candidates}
  for number in range(rounds):
    for name, candidate in candidates.items():
      results[name].append(candidate())
    latest = ', '.join(f'{n} {r[-1]:.4g}' for n, r in results.items())
    print(f'round {number + 1}: {latest}', flush=True)
  return results


def ratio(results: Mapping[str, list[float]], above: str, below: str) -> float:
  """The ratio of two candidates' medians."""
  return statistics.median(results[above]) / statistics.median(results[below])


def show_ratio(
  results: Mapping[str, list[float]], above: str, below: str
) -> None:
  """Prints the ratio of the medians, and its range over rounds."""
  by_round = [
    a / b for a, b in zip(results[above], results[below], strict=True)
  ]
  print(
    f'ratio={ratio(results, above, below):.3f} ({above} over {below}; medians; '
    f'by round {min(by_round):.3f} to {max(by_round):.3f})'
  )


def train(config: Any, dataset: datasets.Dataset) -> list[dict[str, Any]]:
  """Runs the trainer in a workdir of its own; returns its lines."""
  from bn_repro.runtime.preemption import Preemption
  from bn_repro.runtime.workdir import Workdir, read_metrics
  from bn_repro.training import train as train_lib

  with tempfile.TemporaryDirectory() as folder:
    workdir = Workdir(folder)
    workdir.claim()
    train_lib.train_and_evaluate(
      config, dataset, workdir, Preemption(), 'benchmark'
    )
    lines = read_metrics(workdir.metrics)
    workdir.release()
  return lines


def loop(rounds: int) -> None:
  """Images per second of both loops, and the ratio of their medians."""
  steps = 300
  config = config_lib.load(
    str(ROOT / 'configs/bn_x5.py:mini'),
    (
      f'total_steps={steps}',
      f'log_every={steps // 2}',
      f'eval_every={steps}',
      f'checkpoint_every={steps}',
      'bn.population_batches=1',
    ),
  )
  dataset = datasets.check(config)
  cli.set_up_jax(config)
  import jax

  from bn_repro import parallel
  from bn_repro.training.experiment import create_experiment

  program = create_experiment(config, dataset)
  state = program.initial_state()
  program = program.compile(state)
  batches = next(program.stacked_batches(0, 1))

  def bare() -> float:
    device_state = parallel.replicate(program.mesh, state)
    device_state, _ = program.steps.train_steps(device_state, batches)
    jax.block_until_ready(device_state)
    start = time.perf_counter()
    for _ in range(steps // 2):
      device_state, _ = program.steps.train_steps(device_state, batches)
    jax.block_until_ready(device_state)
    return steps // 2 * config.batch_size / (time.perf_counter() - start)

  def ours() -> float:
    # The second interval: the first has the start-up in it.
    return [
      line['timing']['images_per_second']
      for line in train(config, dataset)
      if line['split'] == 'train'
    ][-1]

  print('images per second')
  results = interleaved({'bare': bare, 'main': ours}, rounds)
  show_ratio(results, 'main', 'bare')


def fig1(rounds: int) -> None:
  """Seconds of both nets of Fig. 1 in the trainer, and in one scan each."""
  configs = [
    config_lib.load(f'{ROOT}/configs/{name}.py:mini')
    for name in ('mnist', 'bn_mnist')
  ]
  dataset = datasets.check(configs[0])
  cli.set_up_jax(configs[0])
  import jax

  from bn_repro import parallel
  from bn_repro.training import steps
  from bn_repro.training.experiment import create_experiment

  def bare_steps(config: Any) -> Callable[[], Any]:
    program = create_experiment(config, dataset)
    step = steps.create_train_step(program.model, program.optimizer, config)

    def all_steps(state: Any, batch: Any) -> Any:
      return jax.lax.scan(
        lambda state, _: step(state, batch),
        state,
        length=config.total_steps,
      )

    run = parallel.data_parallel(all_steps, program.mesh, donate_state=False)
    state = parallel.replicate(program.mesh, program.initial_state())
    batch = next(program.train_batches(0, 1))
    return lambda: jax.block_until_ready(run(state, batch))

  bare = [bare_steps(config) for config in configs]
  results = interleaved(
    {
      'bare': lambda: sum(seconds(run) for run in bare),
      'main': lambda: sum(
        seconds(functools.partial(train, config, dataset)) for config in configs
      ),
    },
    rounds,
  )
  show_ratio(results, 'main', 'bare')


def bn(rounds: int) -> None:
  """Milliseconds of a BN layer at three shapes, float32."""
  import flax.linen as nn
  import jax
  import jax.numpy as jnp

  from bn_repro.models import batch_norm

  layers = {
    'ours': batch_norm.BatchNorm(use_running_average=False),
    'flax': nn.BatchNorm(use_running_average=False),
    'flax, two-pass': nn.BatchNorm(
      use_running_average=False, use_fast_variance=False
    ),
  }

  def of_jax(layer: Any, x: Any, dy: Any, *, backward: bool) -> Any:
    variables = layer.init(jax.random.key(0), x)

    def forward(params: Any, x: Any) -> Any:
      y, updated = layer.apply(
        {**variables, 'params': params}, x, mutable=['batch_stats']
      )
      return (y * dy).sum() if backward else y, updated

    function = (
      jax.grad(forward, argnums=(0, 1), has_aux=True) if backward else forward
    )
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(variables['params'], x))

  def of_torch(x: Any, dy: Any, *, backward: bool) -> Any:
    import torch

    layer = torch.nn.BatchNorm2d(x.shape[-1])
    images = torch.tensor(x.transpose(0, 3, 1, 2)).contiguous()
    gradient = torch.tensor(dy.transpose(0, 3, 1, 2)).contiguous()
    images.requires_grad_(backward)

    def call() -> None:
      y = layer(images)
      if backward:
        y.backward(gradient)

    return call

  ratios: dict[str, list[float]] = {}
  for backward in (False, True):
    for shape in BN_SHAPES:
      key = jax.random.key(1)
      x, dy = jax.random.normal(key, (2, *shape), jnp.float32)
      calls = {
        name: of_jax(layer, x, dy, backward=backward)
        for name, layer in layers.items()
      }
      try:
        import numpy as np

        calls['torch'] = of_torch(np.array(x), np.array(dy), backward=backward)
      except ImportError:
        pass

      def milliseconds(call: Callable[[], Any]) -> float:
        return 1e3 * min(seconds(call) for _ in range(3))

      what = 'forward + backward' if backward else 'forward'
      print(f'{what}, {"x".join(map(str, shape))}, ms')
      results = interleaved(
        {
          name: functools.partial(milliseconds, call)
          for name, call in calls.items()
        },
        rounds,
      )
      for name in results:
        if name != 'ours':
          ratios.setdefault(f'{what}, {name}', []).append(
            ratio(results, 'ours', name)
          )
  for name, values in ratios.items():
    each = ', '.join(f'{value:.2f}' for value in values)
    print(f'ratio={statistics.geometric_mean(values):.3f} ({name}: {each})')


def step(rounds: int) -> None:
  """Milliseconds of a step in `mini`: our BN, flax's, none."""
  config = config_lib.load(str(ROOT / 'configs/bn_baseline.py:mini'))
  dataset = datasets.check(config)
  cli.set_up_jax(config)
  import flax.linen as nn
  import jax

  from bn_repro import parallel
  from bn_repro.models import factory
  from bn_repro.training import steps
  from bn_repro.training.experiment import create_experiment

  program = create_experiment(config, dataset)
  batch = next(program.train_batches(0, 1))
  plain = config_lib.load(str(ROOT / 'configs/inception.py:mini'))
  model = program.model

  flax_norm = functools.partial(
    nn.BatchNorm,
    momentum=config.bn.momentum,
    epsilon=config.bn.epsilon,
    axis_name=parallel.AXIS,
  )
  models = {
    'ours': (config, model),
    'flax': (config, model.clone(norm=flax_norm)),
    'without': (plain, create_experiment(plain, dataset).model),
  }

  def create(config: Any, model: Any) -> Callable[[], float]:
    optimizer = program.optimizer
    variables = factory.initial_variables(
      model, dataset.image_shape, seed=0, init_std=0.0, init_scale=1.0
    )
    state = steps.TrainState(
      step=0, seed=0, opt_state=optimizer.init(variables['params']), **variables
    )
    state = parallel.replicate(program.mesh, state)
    run = parallel.data_parallel(
      steps.create_train_step(model, optimizer, config),
      program.mesh,
      donate_state=False,
    )

    def milliseconds() -> float:
      current = state
      start = time.perf_counter()
      for _ in range(30):
        current, _ = run(current, batch)
      jax.block_until_ready(current)
      return 1e3 * (time.perf_counter() - start) / 30

    return milliseconds

  print('milliseconds a step')
  results = interleaved(
    {name: create(*parts) for name, parts in models.items()}, rounds
  )
  show_ratio(results, 'ours', 'flax')
  show_ratio(results, 'ours', 'without')


def checkpoint(rounds: int) -> None:
  """Seconds of a full-width step, and of starting to save a checkpoint."""
  program, state, batches = _full_width('bn_x5')
  import jax

  from bn_repro import parallel
  from bn_repro.training.checkpoint import Checkpoints

  with (
    tempfile.TemporaryDirectory() as name,
    Checkpoints(Path(name) / 'checkpoints', keep=2) as checkpoints,
  ):
    numbers = itertools.count()
    on_device = parallel.replicate(program.mesh, state)
    jax.block_until_ready(on_device)

    def save() -> float:
      checkpoints.wait()
      return seconds(lambda: checkpoints.save(next(numbers), on_device, {}))

    results = interleaved(
      {'save': save, 'step': _full_width_step(program, state, batches)}, rounds
    )
    checkpoints.wait()
  show_ratio(results, 'save', 'step')


def _full_width(variant: str) -> tuple[Any, Any, Any]:
  """The compiled program of a variant, 8 images; a state; a batch."""
  config = config_lib.load(
    f'{ROOT}/configs/{variant}.py',
    (
      'data.name=synthetic',
      'data.num_shards=1',
      'eval_split=test',
      'batch_size=8',
    ),
  )
  dataset = datasets.check(config)
  cli.set_up_jax(config)
  from bn_repro.training.experiment import create_experiment

  program = create_experiment(config, dataset)
  state = program.initial_state()
  program = program.compile(state)
  return program, state, next(program.stacked_batches(0, 1))


def _full_width_step(
  program: Any, state: Any, batches: Any
) -> Callable[[], float]:
  import jax

  from bn_repro import parallel

  def step() -> float:
    on_device = parallel.replicate(program.mesh, state)
    jax.block_until_ready(on_device)
    return seconds(
      lambda: jax.block_until_ready(
        program.steps.train_steps(on_device, batches)
      )
    )

  return step


def distortion(rounds: int) -> None:
  """Seconds of full-width steps, and of their distortions alone."""
  for variant in ('bn_x5', 'inception'):
    _distortion_of(variant, rounds)


def _distortion_of(variant: str, rounds: int) -> None:
  program, state, batches = _full_width(variant)
  config = program.config
  import jax

  from bn_repro import parallel
  from bn_repro.data import preprocess
  from bn_repro.training import steps

  batch = next(program.train_batches(0, 1))

  def distort(at: Any, batch: Any) -> Any:
    seed, number = at
    images = steps.distorted_images(
      batch['image'], seed, number, config.data.distortion
    )
    return parallel.gather(preprocess.normalize(images, program.model.dtype))

  alone = parallel.data_parallel(distort, program.mesh, donate_state=False)
  at = parallel.replicate(program.mesh, (state.seed, state.step))
  print(f'{variant}, seconds')
  results = interleaved(
    {
      'distortion': lambda: seconds(
        lambda: jax.block_until_ready(alone(at, batch))
      ),
      'step': _full_width_step(program, state, batches),
    },
    rounds,
  )
  print(f'{variant}, {config.data.distortion}:', end=' ')
  show_ratio(results, 'distortion', 'step')


def devices(rounds: int) -> None:
  """Final accuracies with population statistics, and their difference."""
  from bn_repro.runtime.workdir import read_metrics

  config = f'{ROOT}/configs/bn_x5.py:mini'
  steps = min(100 * rounds, config_lib.load(config).total_steps)

  def accuracy(number: int, seed: int) -> float:
    flags = f'--xla_force_host_platform_device_count={number}'
    with tempfile.TemporaryDirectory() as workdir:
      subprocess.run(
        [
          sys.executable,
          '-m',
          'bn_repro.main',
          f'--config={config}',
          f'--workdir={workdir}',
          f'--config.seed={seed}',
          f'--config.total_steps={steps}',
          f'--config.eval_every={steps}',
          f'--config.checkpoint_every={steps}',
          '--config.model.dtype=float32',
        ],
        cwd=ROOT,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags},
        stdout=subprocess.DEVNULL,
        check=True,
      )
      (found,) = (
        line['accuracy']
        for line in read_metrics(Path(workdir, 'metrics.jsonl'))
        if line['split'] == 'validation' and line['statistics'] == 'population'
      )
    return found

  found: dict[int, list[float]] = {1: [], 8: []}
  for seed in range(3):
    for number, accuracies in found.items():
      accuracies.append(accuracy(number, seed))
    latest = ', '.join(f'{a[-1]:.4f} on {n}' for n, a in found.items())
    print(f'seed {seed}, {steps} steps: {latest}', flush=True)
  one, eight = map(statistics.mean, found.values())
  by_seed = [b - a for a, b in zip(*found.values(), strict=True)]
  print(
    f'accuracy_difference={eight - one:+.4f} (mean on 8 devices, {eight:.4f}, '
    f'less that on 1, {one:.4f}; by seed {min(by_seed):+.4f} to '
    f'{max(by_seed):+.4f})'
  )


def input_pipelines(rounds: int) -> None:
  """Images per second of processors and of the clock, and PSNR."""
  import benchmark_input
  import numpy as np

  images = 3 * benchmark_input.BATCH_SIZE
  python = {'tf.data': str(ROOT / '.venv-prepare/bin/python')}
  subprocess.run(
    [
      'bash',
      '-c',
      'source scripts/environment.sh; '
      'use_environment requirements-prepare.txt .venv-prepare',
    ],
    cwd=ROOT,
    check=True,
  )
  with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
    folder = Path(name)
    make_photographs(folder, images)
    subprocess.run(
      [python['tf.data'], '-c', _TO_TFRECORD, str(folder)],
      env={**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '3'},
      check=True,
    )
    processes = {
      name: stack.enter_context(
        subprocess.Popen(
          [
            python.get(name, sys.executable),
            str(ROOT / 'scripts/benchmark_input.py'),
            name,
            str(folder),
          ],
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          env={**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '3'},
          text=True,
        )
      )
      for name in benchmark_input.PIPELINES
    }

    def ask(name: str, question: str) -> dict[str, float]:
      process = processes[name]
      assert process.stdin is not None and process.stdout is not None
      process.stdin.write(question + '\n')
      process.stdin.flush()
      answer = process.stdout.readline()
      if not answer:
        raise RuntimeError(f'{name} has ended with {process.wait()}')
      return json.loads(answer)

    wall: dict[str, list[float]] = {name: [] for name in processes}

    def measure(name: str) -> float:
      answer = ask(name, '15')
      wall[name].append(answer['images'] / answer['wall'])
      return answer['images'] / answer['cpu']

    print('images a second of one core')
    results = interleaved(
      {name: functools.partial(measure, name) for name in processes}, rounds
    )
    reference = antialiased_views(folder)
    quality = {}
    for name in ('ours', 'tf.data', 'pillow'):
      ask(name, 'views')
      error = np.load(folder / f'{name}.npy').astype(float) - reference
      by_image = np.mean(error**2, (1, 2, 3))
      quality[name] = float(np.mean(10 * np.log10(255**2 / by_image)))
  for name in results:
    psnr = f'{quality[name]:.1f} dB' if name in quality else '-'
    print(
      f'{name:12}  {statistics.median(results[name]):7.0f} images/CPU-s  '
      f'{statistics.median(wall[name][1:]):7.0f} images/s  {psnr:>8}  '
      f'{ratio(results, name, "tf.data"):.2f} of tf.data'
    )
  print(
    f'ratio={ratio(results, "ours", "tf.data"):.2f} psnr={quality["ours"]:.1f} '
    f'psnr_tfdata={quality["tf.data"]:.1f}'
  )


# Run where TensorFlow is: the photographs once more, as tfds has TFRecord.
_TO_TFRECORD = """
from pathlib import Path
import sys
import tensorflow as tf
folder = Path(sys.argv[1])
with tf.io.TFRecordWriter(str(folder / 'photographs.tfrecord')) as writer:
  for path in sorted(folder.glob('*.jpg')):
    image = tf.train.BytesList(value=[path.read_bytes()])
    label = tf.train.Int64List(value=[0])
    feature = {
      'image': tf.train.Feature(bytes_list=image),
      'label': tf.train.Feature(int64_list=label),
    }
    features = tf.train.Features(feature=feature)
    writer.write(tf.train.Example(features=features).SerializeToString())
"""


def make_photographs(folder: Path, count: int) -> None:
  """JPEGs of 500 x 375 pixels, of a size like ImageNet's, from three photos.

  They are pieces of the two photos of scikit-learn and the one of Matplotlib,
  at the scale at which they fill the frame and up to a quarter above. Beside
  the files they stand in `folder` as ArrayRecord, and with a box for each.
  """
  import make_stand_in
  import matplotlib as mpl
  import numpy as np
  from PIL import Image
  from sklearn.datasets import load_sample_images

  from bn_repro.data import crops, imagenet_metadata

  photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
  hopper = Path(mpl.get_data_path(), 'sample_data/grace_hopper.jpg')
  photos.append(Image.open(hopper).convert('RGB'))
  rng = np.random.default_rng(0)
  encoded, boxes = [], []
  for number in range(count):
    photo = photos[number % len(photos)]
    scale = max(500 / photo.width, 375 / photo.height) * rng.uniform(1, 1.25)
    size = (math.ceil(photo.width * scale), math.ceil(photo.height * scale))
    left, top = rng.integers(0, (size[0] - 499, size[1] - 374))
    piece = photo.resize(size, Image.Resampling.BICUBIC).crop(
      (left, top, left + 500, top + 375)
    )
    file = io.BytesIO()
    piece.save(file, 'JPEG', quality=95)
    encoded.append(file.getvalue())
    boxes.append(crops.random_box(500, 375, rng.random(crops.NUM_DRAWS)))
    (folder / f'{number:04}.jpg').write_bytes(encoded[-1])
  (folder / 'boxes.json').write_text(json.dumps(boxes))
  sizes = [len(raw) for raw in encoded]
  print(f'{count} photographs of {statistics.mean(sizes) / 1e3:.0f} kB')
  synset = imagenet_metadata.synsets()[0]
  first = imagenet_metadata.validation_synsets()[0]
  label = imagenet_metadata.synsets().index(first)
  make_stand_in.write_prepared(
    folder,
    {
      'train': [
        (f'{synset}_{i}.JPEG', 0, raw) for i, raw in enumerate(encoded)
      ],
      'validation': [('ILSVRC2012_val_00000001.JPEG', label, encoded[0])],
    },
    num_shards=1,
  )


def antialiased_views(folder: Path) -> Any:
  """The boxes of `make_photographs`, by Pillow's bicubic resizing, float64."""
  import benchmark_input
  import numpy as np
  from PIL import Image

  boxes = json.loads((folder / 'boxes.json').read_text())
  size = (benchmark_input.SIZE, benchmark_input.SIZE)
  views = [
    np.asarray(
      Image.open(path).resize(
        size,
        Image.Resampling.BICUBIC,
        (left, top, left + width, top + height),
      )
    )
    for path, (left, top, width, height) in zip(
      sorted(folder.glob('*.jpg')), boxes, strict=True
    )
  ]
  return np.stack(views).astype(np.float64)


def stream(rounds: int) -> None:
  """Seconds and bytes of the training stream on an index of full size."""
  del rounds
  import make_stand_in
  from PIL import Image

  from bn_repro.data import imagenet_metadata

  synsets = imagenet_metadata.synsets()
  labels = {synset: label for label, synset in enumerate(synsets)}
  of_validation = imagenet_metadata.validation_synsets()
  file = io.BytesIO()
  picture = make_stand_in.picture(synsets[0], 0)
  Image.open(io.BytesIO(picture)).resize((64, 48)).save(file, 'JPEG')
  count = imagenet_metadata.NUM_EXAMPLES['train']
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    print(f'writing {count:,} small images', flush=True)
    make_stand_in.write_prepared(
      folder,
      {
        'train': (
          (f'{synsets[i % 1000]}_{i}.JPEG', i % 1000, file.getvalue())
          for i in range(count)
        ),
        'validation': (
          (f'ILSVRC2012_val_{i:08}.JPEG', labels[synset], file.getvalue())
          for i, synset in enumerate(of_validation, start=1)
        ),
      },
      num_shards=1024,
    )
    start = time.perf_counter()
    with subprocess.Popen(
      [
        sys.executable,
        str(ROOT / 'scripts/benchmark_input.py'),
        'stream',
        str(folder),
        '10000',
      ],
      stdout=subprocess.PIPE,
      text=True,
    ) as process:
      assert process.stdout is not None
      first = json.loads(process.stdout.readline())
      seconds_to_first = time.perf_counter() - start
      print(
        f'first batch after {seconds_to_first:.1f} s, '
        f'{first["first"]:.1f} s of them after starting Python',
        flush=True,
      )
      early, late = (json.loads(line)['bytes'] for line in process.stdout)
    if process.returncode:
      raise RuntimeError(f'the stream ended with {process.returncode}')
  print(
    f'first_batch_seconds={seconds_to_first:.1f} resident_gb={late / 1e9:.2f} '
    f'growth={late / early - 1:.2%}'
  )


BENCHMARKS = {
  'loop': loop,
  'fig1': fig1,
  'bn': bn,
  'checkpoint': checkpoint,
  'devices': devices,
  'distortion': distortion,
  'input': input_pipelines,
  'step': step,
  'stream': stream,
}


def main() -> int:
  """Runs the benchmark that is named."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('name', choices=BENCHMARKS)
  parser.add_argument('--rounds', type=int, default=7)
  flags = parser.parse_args()
  try:
    BENCHMARKS[flags.name](flags.rounds)
  except (subprocess.CalledProcessError, RuntimeError) as error:
    print(
      f'error: {flags.name} could not be measured: {error}', file=sys.stderr
    )
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
