"""Trains a network from a config file; the same command resumes.

Everything that can be wrong with a command is found before JAX is imported.
"""

import argparse
from collections.abc import Callable, Sequence
import json
import os
import sys
import time
import traceback
from typing import NoReturn

from ml_collections import ConfigDict

from bn_repro import cli
from bn_repro import config as config_lib
from bn_repro.data import datasets
from bn_repro.errors import UserError
from bn_repro.runtime import processes
from bn_repro.runtime import workdir as workdir_lib
from bn_repro.runtime.preemption import Preemption

_DESCRIPTION = """\
Train one of the paper's networks. The same command goes on from the newest
checkpoint, bit for bit; on a finished run it says so and changes nothing.
"""

_EPILOG = """\
configs:
  inception  bn_baseline  bn_x5  bn_x30  bn_x5_sigmoid, the controls
  inception_x5  inception_sigmoid, and Fig. 1's mnist  bn_mnist. In each, full
  (the default) is the paper's experiment and mini takes minutes on a CPU.

examples:
  python -m bn_repro.main --config=configs/bn_x5.py:mini --workdir=runs/bn_x5
  python -m bn_repro.main --config=configs/bn_x5.py:mini --workdir=runs/slow \\
    --config.optim.learning_rate=0.05 --config.total_steps=1000
  python -m bn_repro.main --config=configs/bn_x5.py:mini --workdir=runs/shirt \\
    --config.data.name=fashion_mnist

writes into the workdir:
  config.json  run.json  metrics.jsonl  status.json  checkpoints/

exit code:
  0 done; 75 stopped by SIGTERM or Ctrl-C and saved, run it again; 1 failed;
  3 diverged, which is a result.

Every field of a config stands, explained, in configs/inception.py.
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  preemption = Preemption()
  preemption.listen()
  parser = cli.Parser(
    prog='python -m bn_repro.main',
    description=_DESCRIPTION,
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  cli.add_config_arguments(parser)
  parser.add_argument(
    '--workdir',
    required=True,
    metavar='DIR',
    help='directory of this run; created if it is not there',
  )
  processes.add_arguments(parser)
  try:
    flags, overrides = cli.parse_arguments(
      sys.argv[1:] if argv is None else argv, parser
    )
    # Before the processes meet: it may take one of them long.
    prepared = _prepare(flags.config, overrides, flags.workdir)
    processes.connect(flags)
    # JAX's own handling of SIGTERM came with that.
    preemption.listen()
    config, workdir, dataset = processes.run_on_all(prepared)
    workdir.writes = processes.is_first()
    # Process 0 decides: others may see an older state of a shared folder.
    ended = processes.run_on_all(
      lambda: _already_ended(workdir, config, dataset)
    )
    ended = json.loads(processes.gather(json.dumps(ended))[0])
    if ended is not None:
      return ended
    processes.run_on_all(workdir.claim)
    _check_shared_workdir(workdir)
  except UserError as error:
    return _report(error)
  try:
    status = _train(config, dataset, workdir, preemption, flags.config)
  except UserError as error:
    workdir.release()
    return _report(error)
  except Exception as error:
    processes.leave()
    if isinstance(error, OSError):  # A disk that is full, a file that is gone.
      return cli.report_errors([str(error)])
    traceback.print_exc()
    return workdir_lib.EXIT_CODES[workdir_lib.Status.FAILED]
  return workdir_lib.EXIT_CODES[status]


def _report(error: UserError) -> int:
  """Reports a mistake; where it is this process's alone, leaves the others."""
  if not isinstance(error, processes.AllProcessesError):
    processes.leave()
  return cli.report_errors(error.problems)


def _prepare(
  config_file: str, overrides: Sequence[str], workdir_path: str
) -> Callable[[], tuple[ConfigDict, workdir_lib.Workdir, datasets.Dataset]]:
  """Reads and checks all that a command names.

  Returns:
    A function that returns it, or raises what was wrong with it: where there
    are several processes, when all of them can hear of it.
  """
  try:
    config = config_lib.load(config_file, overrides)
    workdir = workdir_lib.Workdir(workdir_path)
    workdir.check(config)
    dataset = datasets.check(config)
  except (UserError, OSError) as error:
    problem = error

    def fail() -> NoReturn:
      raise problem

    return fail
  return lambda: (config, workdir, dataset)


def _check_shared_workdir(workdir: workdir_lib.Workdir) -> None:
  """Sees that every process finds what process 0 has written.

  Raises:
    UserError: if one of them does not.
  """
  holder = processes.gather(workdir.holder())[0]

  def see() -> None:
    # A network's file system may show it late.
    give_up = time.monotonic() + processes.SHARED_TIMEOUT
    while workdir.holder() != holder:
      if time.monotonic() < give_up:
        time.sleep(0.5)
        continue
      raise UserError(
        f'--workdir={workdir.path}: this host does not see what process 0 '
        f'({holder}) writes there. Several hosts need one folder that all of '
        'them share, such as one on NFS.'
      )

  processes.run_on_all(see)


def _already_ended(
  workdir: workdir_lib.Workdir, config: ConfigDict, dataset: datasets.Dataset
) -> int | None:
  """The exit code of a run that has nothing left to do, having said so."""
  status = workdir.status()
  name, step = status.get('status'), status.get('step')
  if name == workdir_lib.Status.DONE and step == config_lib.total_steps(
    config, len(dataset.splits['train'])
  ):
    said = f'{workdir.path}: this run is done, at step {step}.'
  elif name == workdir_lib.Status.DIVERGED:
    said = (
      f'{workdir.path}: this run has diverged ({status["reason"]}) and would '
      'again. Use another workdir for another attempt.'
    )
  else:
    return None
  if workdir.writes:
    print(said)
  return workdir_lib.EXIT_CODES[workdir_lib.Status(name)]


def _train(
  config: ConfigDict,
  dataset: datasets.Dataset,
  workdir: workdir_lib.Workdir,
  preemption: Preemption,
  config_file: str,
) -> workdir_lib.Status:
  """Sets JAX up and trains; returns the status."""
  cli.set_up_jax(config)
  from bn_repro.training import train

  return train.train_and_evaluate(
    config, dataset, workdir, preemption, config_file
  )


def run_and_exit() -> NoReturn:
  """Runs the command and ends the process."""
  exit_code = main()
  processes.disconnect()
  sys.stdout.flush()
  sys.stderr.flush()
  # A compilation, or a save that failed, may be left behind in its thread;
  # nothing waits for them.
  os._exit(exit_code)


if __name__ == '__main__':
  run_and_exit()
