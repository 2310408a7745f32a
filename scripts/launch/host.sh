#!/usr/bin/env bash
# Written by scripts/launch.py, from scripts/launch/host.sh.
# shellcheck disable=SC2016,SC2054,SC2089,SC2090  # Settings contain no code.
COMMAND=(@command@)
SOURCE_URL=@url@
SOURCE_REVISION=@revision@
# In a bucket, or shared by all hosts; see scripts/launch/prepare_host.sh.
WORKDIR=@workdir@
WORKDIR_MOUNT=@workdir_mount@
DATA_DIR=@data_dir@
DATA_DISK=@data@
HOSTS=@num_hosts@
SPOT=@spot@

# Runs on each host of the slice. `slice.sh` copies this file there and calls
#
#   bash NAME/host.sh set_up | train | state | logs | stop
set -euo pipefail
cd "$(dirname "$0")"

# Locks a file or descriptor for a command; fails if another process holds it.
# flock exits with 1 for that alone, and has printed any other error.
locked() {
  local code=0
  flock --nonblock "$@" || code=$?
  [ "$code" -le 1 ] || exit "$code"
  return "$code"
}

# Succeeds while the training loop, or a process that it started, is running:
# they hold the lock.
training() {
  [ -e lock ] && ! locked lock true
}

case " $* " in
  *' -h '* | *' --help '*)
    sed -n '/^# Runs on each/,/^set/s/^# \{0,1\}//p' "$(basename "$0")"
    exit
    ;;
esac

case ${1:-} in
  set_up)
    if [ -n "$SOURCE_URL" ]; then
      [ -d source ] || git clone --quiet "$SOURCE_URL" source
      git -C source checkout --quiet --detach "$SOURCE_REVISION"
    else
      mkdir -p source
      tar --extract --gzip --file=source.tgz --directory=source
    fi
    cd source
    export WORKDIR WORKDIR_MOUNT DATA_DIR DATA_DISK HOSTS SPOT
    bash scripts/launch/prepare_host.sh
    ;;
  train)
    exec 9>lock
    if ! locked 9; then
      echo 'already training'
      exit
    fi
    cd source
    export PATH=$PWD/.venv/bin:$PATH
    # In a session of its own, the loop outlives the SSH connection.
    nohup setsid bash scripts/train_loop.sh "${COMMAND[@]}" \
      >>../train.log 2>&1 </dev/null &
    echo $! >../pid
    ;;
  state)
    if training; then
      echo "$(hostname): running: $(tail -n 1 train.log)"
      exit
    fi
    # Read after the lock was found free, when the log is complete.
    last=$(grep -s '^train_loop: ' train.log | tail -n 1) || true
    if [[ $last == *': exiting' ]]; then
      echo "$(hostname): ended: $last"
    else
      # The loop was not started, or the host was restarted.
      echo "$(hostname): not running"
    fi
    ;;
  logs)
    tail -n 100 -F train.log
    ;;
  stop)
    # The loop forwards the signal, and exits once the processes have saved.
    ! training || kill -TERM "$(cat pid)"
    flock --timeout 600 lock true
    ;;
  *)
    echo "error: ${1:-no word}: see --help" >&2
    exit 1
    ;;
esac
