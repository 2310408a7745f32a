# Creates virtual environments, installs packages into them, and puts them on the
# PATH. Sourced by other scripts:
#
#   use_environment requirements.txt [FOLDER]    the pinned packages, into .venv
#   use_newest_environment FOLDER                the newest packages of the tests

_enter_environment() {
  local venv=$1
  local python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is not Python 3.11 or newer; set PYTHON to one that is" >&2
    exit 1
  fi
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  # So where Debian lacks python3-venv, also at a second try.
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "error: $venv has no pip; install Python's venv, and delete $venv" >&2
    exit 1
  fi
  if [ -n "${PYTHON:-}" ] && [ "$("$python" -V)" != "$("$venv/bin/python" -V)" ]; then
    echo "error: $venv has $("$venv/bin/python" -V), and PYTHON is $("$python" -V);" \
      "unset PYTHON, or delete $venv" >&2
    exit 1
  fi
  export PATH=$PWD/$venv/bin:$PATH
}

use_environment() {
  local requirements=$1 venv=${2:-.venv}
  _enter_environment "$venv"
  # Install again only if a requirements file has changed.
  local stamp=$venv/installed-$requirements
  if ! cat requirements*.txt | cmp -s - "$stamp"; then
    echo "installing $requirements into $venv ..." || true
    python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    cat requirements*.txt >"$stamp"
  fi
}

use_newest_environment() {
  local venv=$1 list=$1/newest.txt
  _enter_environment "$venv"
  # What these files pin themselves, not what those packages bring.
  awk 'FNR == 1 { own = 1 } /^# Brought/ { own = 0 } own && sub("==", ">=")' \
    requirements.txt requirements-tpu.txt requirements-dev.txt >"$list"
  echo "installing the newest packages into $venv ..."
  python -m pip install --quiet --disable-pip-version-check \
    --upgrade --upgrade-strategy eager -r "$list"
  python -V
  python -m pip freeze -r "$list" | sed '/^##/,$d'
}
