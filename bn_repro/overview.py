"""Prints the layers of a config's network, with parameters and multiply-adds.

python -m bn_repro.overview --config=inception
"""

import argparse
import sys

from bn_repro import cli
from bn_repro import config as config_lib
from bn_repro.data import datasets
from bn_repro.errors import UserError


def main() -> int:
  """Runs the command; returns its exit code."""
  parser = cli.Parser(
    prog='python -m bn_repro.overview',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  cli.add_config_arguments(parser)
  parser.add_argument(
    '--num_classes',
    type=cli.positive,
    metavar='N',
    help='size of the classifier; the default is that of the data set',
  )
  try:
    flags, overrides = cli.parse_arguments(sys.argv[1:], parser)
    config = config_lib.load(flags.config, overrides)
    image_shape, num_classes = datasets.input_size(config)
    cli.set_up_jax(config)
  except UserError as error:
    return cli.report_user_error(error)
  from bn_repro.models import factory, summary

  model = factory.create_model(
    config.model, config.bn, flags.num_classes or num_classes
  )
  for line in summary.table(summary.layers(model, image_shape, depth=2)):
    print(line)
  return 0


if __name__ == '__main__':
  sys.exit(cli.run(main))
