#!/usr/bin/env bash
# Restarts a training command until it is done:
#
#   bash scripts/train_loop.sh python -m bn_repro.main --config=... --workdir=...
#
# exit code of the command                       this script
#   0, 1 or 3: done, failed or diverged            exits with the same code
#   75: preempted and saved                        restarts the command
#   above 128: killed, or aborted because          restarts the command
#     another host was lost
#   any other                                      exits with the same code
#
# SIGTERM, SIGHUP and Ctrl-C are forwarded as SIGTERM, after which the command
# is not restarted: the exit code is 75 if it has saved. After several runs in a
# row that end early, the script gives up with exit code 1.
set -uo pipefail

case ${1:-} in
  -h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
    ;;
  '' | -*)
    echo "error: '${1:-}' is not a command to restart; see --help" >&2
    exit 1
    ;;
esac

# Seconds before a restart. The pause doubles after each run that ends early, up
# to the longest. Our choice, so that hosts that train together meet again: a
# lost host is noticed within a minute, the pauses of two hosts differ by less
# than a minute, and processes wait five minutes for one another.
FIRST_PAUSE=${FIRST_PAUSE:-10}
LONGEST_PAUSE=${LONGEST_PAUSE:-60}
# A run that lasts fewer seconds than LASTING ends early. The script gives up
# after MOST_EARLY_ENDS of them in a row. Our choice.
LASTING=${LASTING:-1200}
MOST_EARLY_ENDS=${MOST_EARLY_ENDS:-10}

say() {
  echo "train_loop: $(date -u +%FT%TZ) $*" >&2
}

signals=0
process=
stop() {
  signals=$((signals + 1))
  [ -z "$process" ] || kill -TERM "$process" 2>/dev/null
}
trap stop TERM INT HUP
# The reader of its messages may exit.
trap '' PIPE

# Runs a command, waits for it despite signals, and stores its exit code in
# `code`. The command has a session of its own, so that Ctrl-C reaches it only
# through `stop`.
run() {
  local before=0
  code=143
  [ "$signals" -eq 0 ] || return
  setsid "$@" &
  process=$!
  # A signal that arrived before `process` was set has not been forwarded.
  [ "$signals" -eq 0 ] || kill -TERM "$process" 2>/dev/null
  before=$signals
  while true; do
    wait "$process"
    code=$?
    [ "$signals" -ne "$before" ] || break
    before=$signals
  done
  process=
}

pause=$FIRST_PAUSE
early_ends=0
while true; do
  start=$SECONDS
  say "running: $*"
  run "$@"
  last=$code
  if [ "$signals" -gt 0 ] || { [ "$last" -ne 75 ] && [ "$last" -le 128 ]; }; then
    say "exit code $last: exiting"
    exit "$last"
  fi
  if [ $((SECONDS - start)) -ge "$LASTING" ]; then
    pause=$FIRST_PAUSE
    early_ends=0
  fi
  early_ends=$((early_ends + 1))
  if [ "$early_ends" -ge "$MOST_EARLY_ENDS" ]; then
    say "error: exit code $last; $early_ends runs in a row ended early"
    say 'exit code 1: exiting'
    exit 1
  fi
  say "exit code $last: restarting in $pause s"
  run sleep "$pause"
  if [ "$signals" -gt 0 ]; then
    say "stopped during the pause, exit code $last: exiting"
    exit "$last"
  fi
  pause=$((pause * 2 < LONGEST_PAUSE ? pause * 2 : LONGEST_PAUSE))
done
