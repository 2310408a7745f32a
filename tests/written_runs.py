"""Workdirs written by hand, whose results follow by arithmetic."""

import json

from bn_repro import config as config_lib
from bn_repro import numerics, paper
from bn_repro.report import runs as runs_lib
from bn_repro.report import sections as sections_lib


def write_run(folder, variant, accuracies, *overrides, **status):
  """Writes a run that was evaluated every 10 steps.

  `accuracies` are with population statistics; with moving averages all are 0.1.
  """
  folder.mkdir(parents=True)
  # Variants whose names are made up have the config of Inception.
  base = variant if variant in paper.PAPER else 'inception'
  config = config_lib.load(f'configs/{base}.py:mini', overrides)
  (folder / 'config.json').write_text(config_lib.to_json(config))
  facts = {
    'config_file': f'configs/{variant}.py:mini',
    'num_classes': 10,
    'numerics': numerics.digest(),
    'applied_learning_rate': (
      config.optim.learning_rate * config.batch_size / 32
    ),
  }
  (folder / 'run.json').write_text(json.dumps(facts))
  last = 10 * len(accuracies)
  status = {'status': 'done', 'step': last, 'reason': '', **status}
  (folder / 'status.json').write_text(json.dumps(status))
  lines = [
    {
      'step': 10 * number,
      'split': config.eval_split,
      'statistics': statistics,
      'loss': 1.0,
      'accuracy': value,
    }
    for number, accuracy in enumerate(accuracies, start=1)
    for statistics, value in (('moving', 0.1), ('population', accuracy))
  ]
  write_lines(folder, lines)


def edit_facts(folder, **facts):
  """Changes entries of `run.json`; None removes one."""
  path = folder / 'run.json'
  facts = {**json.loads(path.read_text()), **facts}
  path.write_text(json.dumps({k: x for k, x in facts.items() if x is not None}))


def add_lines(folder, lines):
  """Adds lines of metrics."""
  text = (folder / 'metrics.jsonl').read_text()
  write_lines(folder, [*map(json.loads, text.splitlines()), *lines])


def write_lines(folder, lines):
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text)


def add_percentiles(folder, percentiles):
  """Adds (evaluations, 3, units) to the lines with population statistics."""
  text = (folder / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  evaluations = [line for line in lines if line['statistics'] == 'population']
  for line, values in zip(evaluations, percentiles, strict=True):
    line['percentiles'] = {'last_hidden_input': values}
  write_lines(folder, lines)


def read_sections(folder):
  """The sections of the runs in a folder, all of them readable."""
  runs, problems = runs_lib.read_runs([str(folder)])
  assert problems == []
  sections, problems = sections_lib.group(runs)
  assert problems == []
  return sections


def read_one(folder):
  """The only run in a folder."""
  ((run,), problems) = runs_lib.read_runs([str(folder)])
  assert problems == []
  return run
