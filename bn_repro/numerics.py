"""The digest of what the code computes, which every run records.

`numerics.json` holds results of training, evaluation, the order of examples and
distortions. A test computes them again, so that a change of the code that
changes results has to change the file, and with it the digest. The digest is
the same on every machine. `scripts/numerics.py` writes the file.
"""

import hashlib
from pathlib import Path

FILE = Path(__file__).with_name('numerics.json')


def digest() -> str:
  """The first 12 hexadecimal digits of the SHA-256 of `numerics.json`."""
  return hashlib.sha256(FILE.read_bytes()).hexdigest()[:12]
