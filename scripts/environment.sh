# Creates a virtual environment, installs a requirements file into it, and puts it
# on the PATH. Sourced by other scripts: use_environment requirements.txt [FOLDER]

use_environment() {
  local requirements=$1 venv=${2:-.venv}
  local python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is not Python 3.11 or newer; set PYTHON to one that is" >&2
    exit 1
  fi
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  # Install again only if a requirements file has changed.
  local stamp=$venv/installed-$requirements
  if ! cat requirements*.txt | cmp -s - "$stamp"; then
    echo "installing $requirements into $venv ..." || true
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      -r "$requirements"
    cat requirements*.txt >"$stamp"
  fi
  export PATH=$PWD/$venv/bin:$PATH
}
