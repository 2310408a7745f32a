"""The errors that commands report to the user, and the limit on open files."""

import resource


class UserError(Exception):
  """A mistake that the user can correct, reported without a traceback.

  Attributes:
    problems: one line for each problem: what is wrong, where, and what to do.
      Characters that cannot be printed are shown as escape sequences.
    exit_code: exit code of a command that reports it.
  """

  exit_code = 1

  def __init__(self, *problems: str):
    self.problems = tuple(
      ''.join(c if c.isprintable() else repr(c)[1:-1] for c in problem)
      for problem in problems
    )
    super().__init__('\n'.join(self.problems))


class TemporaryError(UserError):
  """An error that may pass: later, the same command may succeed."""

  exit_code = 75  # EX_TEMPFAIL of BSD.


def require_open_files(count: int) -> None:
  """Raises the limit on open files of this process to at least `count`.

  Raises:
    UserError: if the system does not allow it.
  """
  # The soft limit is usually 1,024; a process may raise it to the hard limit.
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft == resource.RLIM_INFINITY or soft >= count:
    return
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
  except (OSError, ValueError) as error:  # Above the hard limit.
    raise UserError(
      f'needs {count:,} open files, and the limit is {max(soft, hard):,}. '
      f'Raise the limit: `ulimit -n {count}` as root, nofile in '
      f'/etc/security/limits.conf, or docker run --ulimit nofile={count}.'
    ) from error
