#!/usr/bin/env bash
# Prepares ImageNet as ArrayRecord from its two archives. Only this needs
# TensorFlow, so it makes a separate environment, .venv-prepare.
#
#   bash scripts/prepare_imagenet.sh --help
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
root=$PWD
# The help needs no environment.
case " $* " in
  *' -h '* | *' --help '*)
    exec "${PYTHON:-python3}" scripts/prepare_imagenet.py --help
    ;;
esac
source scripts/environment.sh
use_environment requirements-prepare.txt .venv-prepare
# Relative paths are relative to where the command is given.
cd "$here"
# Prints only TensorFlow's errors. Without oneDNN there is no note about it.
export TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0
exec python "$root/scripts/prepare_imagenet.py" "$@"
