#!/usr/bin/env bash
# Reproduces the paper's Fig. 1 and 2 on real digits, in minutes on two cores.
# Installs the requirements into .venv, trains both networks of Fig. 1, the five
# variants and two controls, and writes a page that compares curves and numbers
# with the paper's.
#
#   bash scripts/quickstart.sh
#
# It can be stopped at any time; the same command resumes.
set -euo pipefail
trap '' PIPE # Its output may fail without ending it.
cd "$(dirname "$0")/.."

case " $* " in
  '  ') ;;
  *' -h '* | *' --help '*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
  *)
    echo "error: $*: quickstart takes no arguments; see --help" >&2
    exit 1
    ;;
esac

source scripts/environment.sh
use_environment requirements.txt

python -m bn_repro.sweep --sweep=quickstart --workdir=runs/quickstart

# results/fig1_settings shows Fig. 1 at other initial weights and learning rates,
# which takes longer to train.
python -m bn_repro.report --runs=runs/quickstart --runs=results/fig1_settings \
  --out=runs/quickstart/report
