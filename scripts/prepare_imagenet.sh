#!/usr/bin/env bash
# Prepares ImageNet as ArrayRecord from its two archives, in an environment of
# its own, .venv-prepare: only this takes TensorFlow.
#
#   bash scripts/prepare_imagenet.sh --help
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
root=$PWD
source scripts/environment.sh
use_environment requirements-prepare.txt .venv-prepare
# Folders are named from where the command is given.
cd "$here"
# Of TensorFlow only errors; without oneDNN it has nothing to say about it.
export TF_CPP_MIN_LOG_LEVEL=3 TF_ENABLE_ONEDNN_OPTS=0
exec python "$root/scripts/prepare_imagenet.py" "$@"
