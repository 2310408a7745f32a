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
# shellcheck disable=SC2016,SC2054,SC2089,SC2090  # Settings are no code.
COMMAND=(@command@)
# A process a node, or a gpu.
TASKS=@tasks@
GPUS=@gpus@
CPUS=@cpus_per_task@

# Trains as a batch job of SLURM. Submit it in the repository, on a file system
# that all nodes share. One loop starts all processes; shortly before the job's
# time is over they save, and the job is put back into the queue.
set -uo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

[ -e scripts/train_loop.sh ] || fail 'submit it in the repository'
export PATH=$PWD/.venv/bin:$PATH
python -c 'import jax_cuda13_plugin' 2>/dev/null ||
  python -c 'import jax_cuda12_plugin' 2>/dev/null ||
  fail ".venv has no JAX for GPUs. Run in the repository: bash -c" \
    "'source scripts/environment.sh && use_environment requirements-gpu.txt'"
if [ "$TASKS" = node ]; then
  # Under SLURM JAX takes one GPU a process, unless it is told of more.
  JAX_LOCAL_DEVICE_IDS=$(seq -s , 0 $((GPUS - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

# In an array: a trial of a sweep.
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || COMMAND+=(--trial="$SLURM_ARRAY_TASK_ID")

told_to_stop=no
# shellcheck disable=SC2329  # The trap below does.
stop() {
  told_to_stop=yes
  kill -TERM "$loop"
}
# Every process sees all GPUs of its node and takes its own; and one that has
# stopped is no reason to kill one that still saves.
bash scripts/train_loop.sh srun --gpu-bind=none --kill-on-bad-exit=0 \
  --cpus-per-task="$CPUS" "${COMMAND[@]}" &
loop=$!
trap stop TERM
wait "$loop"
code=$?
if [ "$told_to_stop" = yes ]; then
  # The signal ended the wait; the loop ends when all is saved.
  wait "$loop"
  code=$?
fi
[ "$code" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
