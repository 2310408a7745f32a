"""Workdirs written by hand, with numbers that can be worked out."""

import json

from bn_repro import config as config_lib


def write_run(
  folder, variant, accuracies, *overrides, mode='mini', every=10, **status
):
  """A run evaluated every 10 steps, its moving averages always at 0.1."""
  folder.mkdir(parents=True)
  base = variant if variant in ('mnist', 'bn_mnist') else 'inception'
  config = config_lib.load(f'configs/{base}.py:{mode}', overrides)
  (folder / 'config.json').write_text(config_lib.to_json(config))
  facts = {
    'config_file': f'configs/{variant}.py:{mode}',
    'applied_learning_rate': (
      config.optim.learning_rate * config.batch_size / 32
    ),
  }
  (folder / 'run.json').write_text(json.dumps(facts))
  last = every * len(accuracies)
  status = {'status': 'done', 'step': last, 'reason': '', **status}
  (folder / 'status.json').write_text(json.dumps(status))
  with (folder / 'metrics.jsonl').open('w') as file:
    for number, accuracy in enumerate(accuracies, start=1):
      for form, value in (('moving', 0.1), ('population', accuracy)):
        line = {
          'step': every * number,
          'split': config.eval_split,
          'statistics': form,
          'loss': 1.0,
          'accuracy': value,
        }
        file.write(json.dumps(line) + '\n')


def add_percentiles(folder, percentiles):
  """Puts (evaluations, 3, units) into the lines with population statistics."""
  path = folder / 'metrics.jsonl'
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  quoted = [line for line in lines if line['statistics'] == 'population']
  for line, values in zip(quoted, percentiles, strict=True):
    line['percentiles'] = {'last_hidden_input': values}
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
