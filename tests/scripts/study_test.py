"""The choice of a learning rate by the study, on runs written by hand."""

import pytest
import study
from written_runs import write_run

from bn_repro.errors import UserError

RATES = study.PARTS['choose_rate'].axes['rate']


def write_choice(out, curves):
  for rate, accuracies in zip(RATES, curves, strict=True):
    override = f'optim.learning_rate={rate}'
    folder = out / 'choose_rate' / f'rate{rate}'
    write_run(folder, 'inception', accuracies, override)


def test_the_highest_mean_of_five_evaluations_is_chosen(tmp_path):
  """Four of .99, or one, are not ranked by their mean."""
  curves = [[0.5] * 5, [0.99] * 4, [0.6] * 5, [0.99], [0.55] * 9, [0.1] * 5]
  write_choice(tmp_path, curves)
  assert study.chosen_rate(tmp_path) == RATES[2]


def test_nothing_to_choose_by(tmp_path):
  write_choice(tmp_path, [[0.9] * 4] * 6)
  with pytest.raises(UserError, match='no run has 5 evaluations'):
    study.chosen_rate(tmp_path)
