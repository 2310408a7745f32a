#!/usr/bin/env bash
#SBATCH --job-name=@name@
#SBATCH --nodes=@nodes@
#SBATCH --ntasks-per-node=@tasks_per_node@
#SBATCH --gpus-per-node=@gpus@
#SBATCH --cpus-per-task=@cpus_per_task@
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=@output@
# Written by scripts/launch.py, from scripts/launch/job.sh.
# shellcheck disable=SC2016,SC2054,SC2089,SC2090  # Settings contain no code.
COMMAND=(@command@)
# One process per node, or one per gpu.
TASKS=@tasks@
GPUS=@gpus@
CPUS=@cpus_per_task@

# Trains as a SLURM batch job. Submit it from the repository, on a file system
# that all nodes share. One loop starts all processes. Five minutes before the
# time limit they save, and the job is requeued.
set -uo pipefail

case ${1:-} in
  -h | --help)
    sed -n '/^# Trains as/,/^set/s/^# \{0,1\}//p' "$0"
    exit
    ;;
esac

fail() {
  echo "error: $*" >&2
  exit 1
}

[ -e scripts/train_loop.sh ] || fail 'submit this job from the repository'
export PATH=$PWD/.venv/bin:$PATH
python -c 'import jax_cuda13_plugin' 2>/dev/null ||
  python -c 'import jax_cuda12_plugin' 2>/dev/null ||
  fail ".venv has no JAX for GPUs. Run in the repository: bash -c" \
    "'source scripts/environment.sh && use_environment requirements-gpu.txt'"
if [ "$TASKS" = node ]; then
  # Under SLURM, JAX uses one GPU per process by default.
  JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((GPUS - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

# A job of an array trains one trial of a sweep.
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || COMMAND+=(--trial="$SLURM_ARRAY_TASK_ID")

stopping=no
# shellcheck disable=SC2329  # Called by the trap below.
stop() {
  stopping=yes
  kill -TERM "$loop"
}
# Every process sees all GPUs of its node and selects its own. A process that
# exits does not end the others, which may still be saving.
bash scripts/train_loop.sh srun --gpu-bind=none --kill-on-bad-exit=0 \
  --cpus-per-task="$CPUS" "${COMMAND[@]}" &
loop=$!
trap stop TERM
wait "$loop"
code=$?
if [ "$stopping" = yes ]; then
  # The signal interrupted `wait`; the loop exits once the processes have saved.
  wait "$loop"
  code=$?
fi
[ "$code" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
