"""A JAX/Flax reproduction of Batch Normalization (Ioffe & Szegedy, 2015).

  import bn_repro
  model = bn_repro.load('runs/bn_x5')
  probabilities = model.predict(['cat.jpg', 'dog.png'])

`load` is imported when it is first used: importing the package imports no JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from bn_repro.inference.model import load as load

__all__ = ['load']

__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
  if name != 'load':
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from bn_repro.runtime import backend

  backend.import_jax()
  from bn_repro.inference.model import load

  return load
