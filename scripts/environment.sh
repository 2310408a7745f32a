# Makes an environment from a bare Python and installs a requirements file into
# it. Sourced by the other scripts: use_environment requirements.txt [FOLDER]

use_environment() {
  local requirements=$1 venv=${2:-.venv}
  local python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is not Python 3.11 or newer; set PYTHON to one that is" >&2
    exit 1
  fi
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  # Installed again only where the pins have changed.
  local stamp=$venv/installed-$requirements
  if ! cat requirements*.txt | cmp -s - "$stamp"; then
    echo "installing $requirements into $venv ..."
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      -r "$requirements"
    cat requirements*.txt >"$stamp"
  fi
  export PATH=$PWD/$venv/bin:$PATH
}
