"""What this process may use of its host."""

import os


def num_cores() -> int:
  """Cores that this process may use: SLURM and taskset may limit them."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
