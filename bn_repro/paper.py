"""Results that the paper reports, by config (Fig. 1, 3, 4, section 4.2.2)."""

from collections.abc import Mapping
import dataclasses

# Batch size of one replica (section 4.2). The paper's learning rates and steps
# refer to it.
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class PaperRow:
  """Results that the paper reports for a variant.

  Attributes:
    label: the paper's name of the variant, or ours if it has none.
    learning_rate: initial learning rate; None if not given.
    steps: millions of steps to 72.2 %; None if never reached.
    accuracy: best accuracy in percent, or the paper's words instead.
  """

  label: str
  learning_rate: float | None
  steps: float | None
  accuracy: str


# Millions of steps that Inception needs to reach its best accuracy, 72.2 %.
INCEPTION_STEPS = 31.0

PAPER: Mapping[str, PaperRow] = {
  'inception': PaperRow('Inception', 0.0015, INCEPTION_STEPS, '72.2'),
  'bn_baseline': PaperRow('BN-Baseline', 0.0015, 13.3, '72.7'),
  'bn_x5': PaperRow('BN-x5', 0.0075, 2.1, '73.0'),
  'bn_x30': PaperRow('BN-x30', 0.045, 2.7, '74.8'),
  'bn_x5_sigmoid': PaperRow('BN-x5-Sigmoid', 0.0075, None, '69.8'),
  'inception_x5': PaperRow('Inception at x5', 0.0075, None, 'machine infinity'),
  'inception_sigmoid': PaperRow(
    'Inception, sigmoid', 0.0015, None, 'chance, 0.1'
  ),
  'mnist': PaperRow('Without BN', None, None, 'lower'),
  'bn_mnist': PaperRow('With BN', None, None, 'higher'),
}

# Variants of section 4.2, in the order of Fig. 3; then the controls.
FIG_3 = tuple(name for name in PAPER if not name.endswith('mnist'))
# Variants of Fig. 1.
FIG_1 = ('mnist', 'bn_mnist')

# Members of the ensemble, the configs in `configs/ensemble/`, and our names for
# them.
ENSEMBLE: Mapping[str, str] = {
  'dropout_5': 'dropout 5 %',
  'dropout_10': 'dropout 10 %',
  'init_2': 'initial weights x2',
  'per_activation': 'per-activation BN',
  'init_2_dropout_5': 'initial weights x2, dropout 5 %',
  'per_activation_dropout_10': 'per-activation BN, dropout 10 %',
}


@dataclasses.dataclass(frozen=True)
class Fig4Row:
  """Errors in percent on the 50,000 validation images of ImageNet (Fig. 4).

  Attributes:
    top1: top-1 error.
    top5: top-5 error.
    note: what the paper adds.
  """

  top1: float
  top5: float
  note: str = ''


# The three networks of Fig. 4 that are the paper's own, by the numbers of
# crops and of networks. Its other rows are networks of other authors.
FIG_4: Mapping[tuple[int, int], Fig4Row] = {
  (1, 1): Fig4Row(25.2, 7.82),
  (144, 1): Fig4Row(21.99, 5.82),
  (144, 6): Fig4Row(
    20.1, 4.9, '4.82 on the 100,000 test images, by the test server'
  ),
}


def speed_up(variant: str) -> float | None:
  """How many times fewer steps than Inception a variant needs to 72.2 %.

  None if it never reaches this accuracy, or if the paper does not say.
  """
  steps = PAPER[variant].steps if variant in PAPER else None
  return INCEPTION_STEPS / steps if steps else None


def rate_multiple(variant: str) -> float:
  """Learning rate of a variant of section 4.2 in multiples of Inception's."""
  ours, theirs = (PAPER[name].learning_rate for name in (variant, 'inception'))
  assert ours is not None
  assert theirs is not None
  return ours / theirs


def label(variant: str) -> str:
  """Name of a variant for readers; the name of its config if unknown."""
  if variant in ENSEMBLE:
    return f'BN-x30, {ENSEMBLE[variant]}'
  return PAPER[variant].label if variant in PAPER else variant
