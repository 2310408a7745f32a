"""The number of files that may be open. Imports nothing that is installed.

The preparation of ImageNet imports it in an environment without `ml_collections`.
"""

try:
  import resource
except ImportError:  # Windows, which has no such limit.
  resource = None  # type: ignore[assignment]


def allow(count: int) -> None:
  """Sees that `count` files may be open at once.

  Raises:
    UserError: if that is not to be had.
  """
  problem = shortage(count)
  if problem:
    from bn_repro.config import UserError

    raise UserError(problem)


def shortage(count: int) -> str | None:
  """As `allow`, but returns what is wrong and what to do, if anything is."""
  if resource is None:
    return None
  # The soft limit is 1,024 by custom, and anybody may raise it to the hard one.
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  unlimited = resource.RLIM_INFINITY
  if soft == unlimited or soft >= count:
    return None
  if hard != unlimited and hard < count:
    return (
      f'{count:,} files have to be open at once, and {hard:,} may be. Raise the '
      f'limit: `ulimit -n {count}` as root, nofile in '
      '/etc/security/limits.conf, or docker run --ulimit nofile='
      f'{count}.'
    )
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
  except (OSError, ValueError) as error:  # macOS has another limit behind it.
    return (
      f'{count:,} files have to be open at once, and {soft:,} may be '
      f'({error}). Raise the limit: `ulimit -n {count}`.'
    )
  return None
