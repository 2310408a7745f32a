"""What each part of the package may import. Imports in functions count."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / 'bn_repro'

_CORE = (
  '__version__ errors files host numerics config config_fields parallel paper '
  'models data runtime training'
)
# A part is a folder of the package or a module; it may import itself and these.
ALLOWED = {
  'errors': '',
  'files': 'errors',
  'host': '',
  'numerics': '',
  'paper': '',
  'parallel': '',
  'models.inception_table': '',
  'models': 'parallel',
  'data': 'errors files host',
  'config_fields': 'errors files models.inception_table',
  'config': 'errors files models.inception_table config_fields',
  'runtime': 'errors files config config_fields',
  'training': _CORE,
  'inference.probabilities': 'errors runtime',
  'inference.averaging': 'errors inference.probabilities',
  'cli': 'errors files config config_fields runtime',
  'report': 'errors files numerics paper config config_fields runtime cli '
  'inference.probabilities inference.averaging',
  'sweep': 'errors files host paper config config_fields runtime cli report '
  'data',
  'tpu': _CORE,
  '__init__': 'inference runtime',
  'inference': f'{_CORE} cli',
  'main': f'{_CORE} cli',
  'export': f'{_CORE} cli inference',
  'predict': f'{_CORE} cli inference report.figures',
  'evaluate': f'{_CORE} cli inference',
  'lab': f'{_CORE} cli report.drawing report.verdicts',
  'overview': f'{_CORE} cli',
  'ensemble': 'errors files runtime cli inference.probabilities '
  'inference.averaging report.figures',
  'examples': f'{_CORE} cli report.figures',
}
# The only parts that may import these packages.
CONFINED = {
  'orbax': 'training.checkpoint',
  'matplotlib': 'report.drawing report.figures sweep.figures',
  'tensorflow_datasets': 'data',
  'array_record': 'data',
  **dict.fromkeys(('google', 'google_crc32c'), 'runtime.buckets'),
  **dict.fromkeys(
    ('jax', 'flax', 'optax'),
    'parallel models data runtime training inference tpu cli lab overview '
    'examples',
  ),
}


def imports(path):
  """Yields the modules that a file imports, by their full names."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}:{node.lineno}: a relative import'
      for alias in node.names:
        name = f'{node.module}.{alias.name}'
        file = PACKAGE.parent.joinpath(*name.split('.'))
        is_module = file.is_dir() or file.with_suffix('.py').is_file()
        is_own = node.module == 'bn_repro'
        yield name if is_module or is_own else node.module


def is_in(module, parts):
  return any(f'{module}.'.startswith(f'{part}.') for part in parts.split())


def test_imports():
  refused = []
  for path in sorted(PACKAGE.rglob('*.py')):
    module = '.'.join(path.relative_to(PACKAGE).with_suffix('').parts)
    part = module if module in ALLOWED else module.split('.')[0]
    for name in imports(path):
      package, _, imported = name.partition('.')
      if package == 'bn_repro':
        if not is_in(imported, f'{part} {ALLOWED[part]}'):
          refused.append(f'{module} -> {imported}')
      elif package in CONFINED and not is_in(module, CONFINED[package]):
        refused.append(f'{module} -> {package}')
  assert refused == []


def test_packages_import_nothing():
  """Except that `bn_repro.load` is imported when it is first used."""
  for path in PACKAGE.rglob('__init__.py'):
    if path.parent != PACKAGE:
      assert path.read_text() == ''
