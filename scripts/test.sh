#!/usr/bin/env bash
# Installs the requirements of the tests into .venv and runs the tests.
#
#   bash scripts/test.sh                the fast tests, minutes on two cores
#   bash scripts/test.sh --all          all tests, the linter and the type checker
#   bash scripts/test.sh --newest       the fast tests with the newest releases of
#                                       the pinned packages, in .venv-newest
#   bash scripts/test.sh -k resume -x   the fast tests, with pytest arguments
set -euo pipefail
cd "$(dirname "$0")/.."

case " $* " in
  *' -h '* | *' --help '*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
esac

source scripts/environment.sh
venv=.venv
if [ "${1:-}" = --newest ]; then
  shift
  venv=.venv-newest
  use_newest_environment "$venv"
else
  use_environment requirements-dev.txt
fi
case " $* " in
  *' --newest '*)
    echo 'error: --newest must be the first argument' >&2
    exit 1
    ;;
esac
# Tests share compiled programs with one another and with later runs.
export JAX_COMPILATION_CACHE_DIR=$PWD/$venv/jax_cache

if [ "${1:-}" = --all ]; then
  shift
  ruff check .
  ruff format --check .
  mypy
  python -m pytest -n 2 --dist loadgroup --strict-skips "$@"
else
  python -m pytest -n 2 --dist loadgroup -m 'not slow' "$@"
fi
