#!/usr/bin/env bash
# Runs a training command again for as long as it is stopped and not finished:
#
#   bash scripts/train_loop.sh python -m bn_repro.main --config=... --workdir=...
#
# when it exits with                             this script
#   0, 1 or 3: done, failed or diverged            ends with the same code
#   75: stopped and saved                          runs it again
#   more than 128: killed, or aborted because      runs it again
#     another host was lost
#   anything else                                  ends with the same code
#
# SIGTERM and Ctrl-C are passed on as SIGTERM, and nothing is run again after
# them: it then ends with 75 if all is saved. Runs that end early time after
# time, for whatever reason, are given up with exit code 1.
set -uo pipefail

# Seconds until the next run: twice as long each time, until a run has lasted.
# All our choice. Of hosts that train together the first to end waits for the
# last: one that is lost is noticed within a minute, and the pauses of two hosts
# differ by less than another, while processes wait five minutes for one another.
FIRST_PAUSE=${FIRST_PAUSE:-10}
LONGEST_PAUSE=${LONGEST_PAUSE:-60}
# Seconds that a run has to last not to count as ended early, and how often in a
# row it may.
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
trap stop TERM INT

# Runs a command to its end, whatever signals come, and leaves its exit code in
# `code`. In a session of its own, Ctrl-C reaches it through `stop` alone.
run() {
  local before=0
  code=143
  [ "$signals" -eq 0 ] || return
  setsid "$@" &
  process=$!
  # One that came since it was looked for had no process to be passed on to.
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
  say "runs $*"
  run "$@"
  last=$code
  if [ "$signals" -gt 0 ] || { [ "$last" -ne 75 ] && [ "$last" -le 128 ]; }; then
    say "exit code $last: ends"
    exit "$last"
  fi
  if [ $((SECONDS - start)) -ge "$LASTING" ]; then
    pause=$FIRST_PAUSE
    early_ends=0
  fi
  early_ends=$((early_ends + 1))
  if [ "$early_ends" -ge "$MOST_EARLY_ENDS" ]; then
    say "error: exit code $last, and $early_ends runs in a row ended early"
    say 'exit code 1: ends'
    exit 1
  fi
  say "exit code $last: again in $pause s"
  run sleep "$pause"
  if [ "$signals" -gt 0 ]; then
    say "stopped in the pause, exit code $last: ends"
    exit "$last"
  fi
  pause=$((pause * 2 < LONGEST_PAUSE ? pause * 2 : LONGEST_PAUSE))
done
