"""How many files may be open at once. Imports nothing that is installed.

Both need it: training, and the preparation of ImageNet, in whose environment
the configs cannot be imported.
"""

import resource


def allow(count: int) -> None:
  """Sees that `count` files may be open at once.

  Raises:
    UserError: if the system does not let us.
  """
  problem = shortage(count)
  if problem:
    from bn_repro.config import UserError

    raise UserError(problem)


def shortage(count: int) -> str | None:
  """As `allow`, but returns what is wrong, with what to do, or None."""
  # The soft limit is 1,024 by custom; anybody may raise it up to the hard one.
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft == resource.RLIM_INFINITY or soft >= count:
    return None
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
  except (OSError, ValueError):  # Above the hard limit, or the system's own.
    return (
      f'{count:,} files have to be open at once, and {max(soft, hard):,} may '
      f'be. Raise the limit: as root `ulimit -n {count}`, nofile in '
      f'/etc/security/limits.conf, or docker run --ulimit nofile={count}.'
    )
  return None
