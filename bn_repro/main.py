"""Trains a network from a config file; the same command resumes.

Mistakes in a command are found before JAX is imported.
"""

import argparse
from collections.abc import Callable, Sequence
import contextlib
import os
from pathlib import Path
import sys
import time
import traceback
from typing import NoReturn

from ml_collections import ConfigDict

from bn_repro import cli, files
from bn_repro import config as config_lib
from bn_repro.data import datasets
from bn_repro.errors import UserError
from bn_repro.runtime import processes, streams
from bn_repro.runtime.mirror import fetch
from bn_repro.runtime.preemption import Preemption
from bn_repro.runtime.workdir import (
  ENDED,
  EXIT_CODES,
  MODEL,
  Status,
  Workdir,
  check_metrics,
)

_DESCRIPTION = """\
Train one of the paper's networks. The same command resumes from the newest
checkpoint, bit for bit. On a finished run it says so and changes nothing.
"""

_EPILOG = """\
configs:
  inception  bn_baseline  bn_x5  bn_x30  bn_x5_sigmoid    section 4.2 and Fig. 2
  inception_x5  inception_sigmoid                         controls without BN
  ensemble/dropout_5 and five more                        section 4.2.3
  mnist  bn_mnist                                         section 4.1 and Fig. 1
  Each has the modes full (the default, the paper's experiment) and mini
  (minutes on a CPU).

examples:
  python -m bn_repro.main --config=bn_x5:mini --workdir=runs/bn_x5
  python -m bn_repro.main --config=bn_x5:mini --workdir=runs/slow \\
    --config.optim.learning_rate=0.05 --config.total_steps=1000
  python -m bn_repro.main --config=bn_x5:mini --workdir=runs/shirt \\
    --config.data.name=fashion_mnist

writes into the workdir:
  config.json  run.json  metrics.jsonl  status.json  checkpoints/
  model.safetensors, the network at the last evaluation

exit code:
  0   done
  1   failed
  3   diverged, which is a result
  75  stopped by SIGTERM, Ctrl-C or a closed terminal, and saved: run the same
      command again

The run goes on when its output cannot be written.

configs/inception.py explains every field of a config.
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  try:
    return _main(argv)
  except Exception as error:
    if not processes.is_peer_failure(error):
      raise
    # Before the first step or while processes compare what they have.
    reason = str(error).splitlines()[0]
    print(f'error: lost another process: {reason}', file=sys.stderr)
    processes.leave()
    return EXIT_CODES[Status.PREEMPTED]


def _main(argv: Sequence[str] | None) -> int:
  """Trains; raises if another process is lost before training starts."""
  preemption = Preemption()
  preemption.listen()
  try:
    flags, overrides = cli.parse_arguments(
      sys.argv[1:] if argv is None else argv, _create_parser()
    )
    streams.make_output_optional()
    # Before processes connect: the checks of one may take long.
    checked = _check(flags.config, overrides, flags.workdir)
    processes.connect(flags)
    # Again, because JAX has installed its own handler of SIGTERM.
    preemption.listen()
    config, workdir, dataset = processes.run_on_all(checked)
    workdir.writes = processes.is_first()
    exit_code = _exit_code_if_ended(
      workdir, config, dataset, accept_lost_metrics=flags.accept_lost_metrics
    )
    if exit_code is not None:
      return exit_code
    processes.run_on_all(lambda: cli.set_up_jax(config))
    processes.run_on_all(workdir.claim)
    _check_shared_workdir(workdir)
  except UserError as error:
    return _report(error)
  try:
    from bn_repro.training import train

    status = train.train_and_evaluate(
      config,
      dataset,
      workdir,
      preemption,
      flags.config,
      accept_lost_metrics=flags.accept_lost_metrics,
    )
    workdir.release()
  except UserError as error:
    with contextlib.suppress(UserError):
      workdir.release()
    return _report(error)
  except Exception as error:
    if processes.is_peer_failure(error):
      raise
    if isinstance(error, OSError):  # Such as a full disk or a missing file.
      cli.report_errors([str(error)])
    else:
      traceback.print_exc()
    processes.leave()
    return EXIT_CODES[Status.FAILED]
  return EXIT_CODES[status]


def _create_parser() -> cli.Parser:
  parser = cli.Parser(
    prog='python -m bn_repro.main',
    description=_DESCRIPTION,
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  cli.add_config_arguments(parser)
  files.add_path_argument(
    parser,
    '--workdir',
    required=True,
    in_bucket=True,
    help='directory of this run, or gs://BUCKET/NAME; created if it does not '
    'exist',
  )
  parser.add_argument(
    '--accept_lost_metrics',
    action='store_true',
    help='resume although lines of metrics.jsonl are lost or were edited',
  )
  processes.add_arguments(parser)
  return parser


def _report(error: UserError) -> int:
  """Prints an error; leaves the other processes if they do not have it too."""
  exit_code = cli.report_user_error(error)
  if not isinstance(error, processes.AllProcessesError):
    processes.leave()
  return exit_code


def _check(
  config_spec: str, overrides: Sequence[str], workdir_path: Path
) -> Callable[[], tuple[ConfigDict, Workdir, datasets.Dataset]]:
  """Loads and checks everything that a command names.

  Returns:
    A function that returns the result or raises the error, to be called when
    the processes are connected and all of them can learn of an error.
  """
  try:
    config = config_lib.load(config_spec, overrides)
    workdir = Workdir(workdir_path)
    workdir.check(config)
    dataset = datasets.check(config)
  except (UserError, OSError) as error:
    problem = error

    def fail() -> NoReturn:
      raise problem

    return fail
  return lambda: (config, workdir, dataset)


def _exit_code_if_ended(
  workdir: Workdir,
  config: ConfigDict,
  dataset: datasets.Dataset,
  *,
  accept_lost_metrics: bool,
) -> int | None:
  """Returns the exit code of a run that has ended, and prints why it has.

  Process 0 decides for all: on a shared directory, others may see an older
  state.

  Raises:
    UserError: if lines of its metrics are lost and that is not accepted. If it
      is, the run has not ended: it writes its last lines again.
  """

  def ended() -> tuple[int, str] | None:
    if not workdir.writes:
      return None
    found = Workdir(fetch(workdir.path, ['status.json']))
    status = found.status()
    if status.get('status') not in ENDED:
      return None
    # A run that goes on downloads them when it claims the workdir.
    fetch(workdir.path, ['metrics.jsonl', MODEL])
    num_examples = len(dataset.splits['train'])
    total_steps = config_lib.total_steps(config, num_examples)
    is_done = (
      status.get('status') == Status.DONE and status.get('step') == total_steps
    )
    if is_done and not found.model.exists():
      return None  # The last evaluation writes it again.
    if is_done:
      message = f'this run is done, at step {status["step"]}.'
    elif status.get('status') == Status.DIVERGED:
      message = (
        f'this run has diverged ({status["reason"]}) and would do so again. '
        'Use another workdir for another attempt.'
      )
    else:
      return None
    try:
      check_metrics(found.metrics, status.get('metrics'))
    except UserError:
      if not accept_lost_metrics:
        raise
      return None
    return EXIT_CODES[Status(status['status'])], message

  found = processes.broadcast(processes.run_on_all(ended))
  if found is None:
    return None
  exit_code, message = found
  if workdir.writes:
    print(f'{workdir}: {message}')
  return exit_code


def _check_shared_workdir(workdir: Workdir) -> None:
  """Checks that every process sees the files that process 0 writes.

  Those in a bucket are for other machines; no other process reads them now.

  Raises:
    AllProcessesError: if one of them does not.
  """
  if files.place_of(workdir.path):
    return
  holder = processes.broadcast(workdir.holder())

  def check() -> None:
    # A network file system may show it late.
    deadline = time.monotonic() + processes.SHARED_TIMEOUT
    while workdir.holder() != holder:
      if time.monotonic() > deadline:
        raise UserError(
          f'--workdir={workdir.path}: this host does not see what process 0 '
          f'({holder}) writes there. Use a directory that all hosts share, '
          'such as one on NFS.'
        )
      time.sleep(0.5)

  processes.run_on_all(check)


def run_and_exit() -> NoReturn:
  """Runs the command and exits."""
  exit_code = cli.run(main)
  processes.disconnect()
  # Without waiting for threads: one may still compile, or save in vain.
  os._exit(exit_code)


if __name__ == '__main__':
  run_and_exit()
