"""Whether overridden runs are told from those of their configs."""

import pytest
from written_runs import read_sections, write_run

from bn_repro.paper import FIG_3
from bn_repro.report import variants


def write_variant(folder, variant, *overrides):
  write_run(folder / variant, variant, [0.5], *overrides)


def found(folder):
  return variants.changed(read_sections(folder))


def write_scaled(folder, variant, *overrides):
  """As in a sweep: other data, 7 times as long, at half the rate."""
  lengths = dict.fromkeys(FIG_3, 3500) | {'inception': 7000}
  rates = dict.fromkeys(FIG_3, 0.05) | {'bn_x30': 0.3}
  rates |= dict.fromkeys(
    ('inception', 'bn_baseline', 'inception_sigmoid'), 0.01
  )
  epochs = 0.96 / (6 if variant.startswith('bn_x') else 1)
  write_variant(
    folder,
    variant,
    'data.name=fashion_mnist',
    'model.width=0.25',
    f'total_steps={lengths[variant]}',
    f'optim.learning_rate={rates[variant]}',
    f'optim.decay_epochs={epochs / 3:g}',
    *overrides,
  )


def test_the_same_changes_of_all_variants_are_a_setting(tmp_path):
  for variant in FIG_3:
    write_variant(tmp_path / 'shipped', variant)
    write_scaled(tmp_path / 'scaled', variant)
  assert found(tmp_path) == []


@pytest.mark.parametrize(
  'variant, overrides, shown',
  [
    (
      'bn_x5',
      ['optim.learning_rate=0.07'],
      'optim.learning_rate 0.07 beside 0.01, not 0.05 beside 0.01',
    ),
    (
      'bn_x5',
      ['total_steps=70000'],
      'total_steps 70000 beside 7000, not 3500 beside 7000',
    ),
    (
      'bn_x30',
      ['optim.decay_epochs=0.32'],
      'optim.decay_epochs 0.32 beside 0.32, not 0.0533333 beside 0.32',
    ),
    # A change that the config makes is missing; one that it does not is made.
    (
      'bn_x5_sigmoid',
      ['model.lrn=true', 'bn.momentum=0.5'],
      'bn.momentum 0.5 beside 0.9, not 0.9 beside 0.9; model.lrn True beside '
      'True, not False beside True',
    ),
    (
      'bn_baseline',
      ['data.shuffle=global', 'model.init_scale=2.0'],
      'data.shuffle global beside none, not none beside none; '
      'model.init_scale 2 beside 1, not 1 beside 1',
    ),
  ],
)
def test_what_one_variant_changes_is_named(variant, overrides, shown, tmp_path):
  for name in FIG_3:
    changes = overrides if name == variant else []
    write_scaled(tmp_path, name, *changes)
  (message,) = found(tmp_path)
  start, _, fields = message.partition(f' as configs/{variant}.py does: ')
  assert start.startswith(f'{tmp_path.name}: BN-')
  assert start.endswith(' does not differ from Inception')
  assert fields == f'{shown}.'
