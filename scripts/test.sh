#!/usr/bin/env bash
# Installs what tests need into .venv and runs them.
#
#   bash scripts/test.sh                the fast set, minutes on two cores
#   bash scripts/test.sh --all          everything, with lint and types
#   bash scripts/test.sh -k resume -x   any pytest arguments
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-} in
  -h | --help)
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac

source scripts/environment.sh
use_environment requirements-dev.txt
# Compiled programs are shared by the tests, and by the next time.
export JAX_COMPILATION_CACHE_DIR=$PWD/.venv/jax_cache

if [ "${1:-}" = --all ]; then
  shift
  ruff check .
  ruff format --check .
  mypy
  python -m pytest -n 2 --strict-skips "$@"
else
  python -m pytest -n 2 -m 'not slow' "$@"
fi
