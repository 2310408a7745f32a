"""Errors that a user can act on, and the limit of open files."""

import resource


class UserError(Exception):
  """A mistake in a command, told in one line a problem, without a traceback.

  Attributes:
    problems: what was wrong, where, and what to do, a line each.
  """

  def __init__(self, *problems: str):
    super().__init__('\n'.join(problems))
    self.problems = problems


def require_open_files(count: int) -> None:
  """Raises the limit of open files to at least `count`.

  Raises:
    UserError: if the system does not allow it.
  """
  # The soft limit is 1,024 by custom; a process may raise it to the hard one.
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft == resource.RLIM_INFINITY or soft >= count:
    return
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
  except (OSError, ValueError) as error:  # The hard limit, or the system's.
    raise UserError(
      f'{count:,} files have to be open at once, and {max(soft, hard):,} may '
      f'be. Raise the limit: as root `ulimit -n {count}`, nofile in '
      f'/etc/security/limits.conf, or docker run --ulimit nofile={count}.'
    ) from error
