"""Training steps at paper scale: images per second, and memory."""

from typing import TYPE_CHECKING, Any

from benchmarks import measure

from gpu_checks import device
from gpu_checks.outcomes import Figure, Settings

if TYPE_CHECKING:
  from bn_repro.training.experiment import Experiment

# In ascending order: the peak of a process is then that of the last one.
BATCH_SIZES = (32, 64, 128, 256)
# Steps between two readings of the clock, and such readings. Our choice.
_STEPS, _ROUNDS = 20, 5


def bfloat16(settings: Settings) -> list[Figure]:
  """Measures steps in bfloat16."""
  return _measure(settings, 'bfloat16')


def float32(settings: Settings) -> list[Figure]:
  """Measures steps in float32."""
  return _measure(settings, 'float32')


def _measure(settings: Settings, dtype: str) -> list[Figure]:
  """Measures steps of BN-Baseline on generated images; sets no bounds."""
  checked = device.start(settings.platform)
  import jax

  spec = settings.config('bn_baseline')
  figures = []
  for batch_size in (4, 8) if settings.quick else BATCH_SIZES:
    name = f'{spec}, {dtype}, {batch_size} images'
    try:
      experiment = measure.create_experiment(
        spec,
        *settings.overrides,
        *measure.FULL_WIDTH,
        f'model.dtype={dtype}',
        f'batch_size={batch_size}',
      )
      figures += _of_experiment(experiment, checked, name, quick=settings.quick)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      figures.append(
        Figure(name, 0, 'images/s', note='does not fit into memory')
      )
      break
  return figures


def _of_experiment(
  experiment: 'Experiment', checked: Any, name: str, *, quick: bool
) -> list[Figure]:
  """Images per second, and the peak of memory on the device."""
  steps, rounds = (2, 2) if quick else (_STEPS, _ROUNDS)
  timer = measure.train_step_timer(experiment, steps)
  results = measure.interleaved({name: timer}, rounds)
  images = steps * experiment.config.batch_size
  rate = measure.median(
    name, [images / seconds for seconds in results[name]], 'images/s'
  )
  note = f'by round {rate.low:,.0f} to {rate.high:,.0f}'
  figures = [Figure(name, rate.value, 'images/s', note=note)]
  if memory := checked.memory_stats():  # CPUs have none.
    peak = memory['peak_bytes_in_use'] / 1e9
    figures.append(Figure(f'{name}: peak of memory', peak, 'GB'))
  return figures
