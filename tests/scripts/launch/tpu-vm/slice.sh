#!/usr/bin/env bash
# Written by scripts/launch.py, from scripts/launch/slice.sh.
NAME=bn-x30
PROJECT=PROJECT
ZONE=us-west4-a
ACCELERATOR_TYPE=v5litepod-16
RUNTIME_VERSION=v2-alpha-tpuv5-lite
HOSTS=4
SPOT=yes
# Disk of this project and zone that all hosts read; may be empty.
DATA_DISK=imagenet
# no if the workdir is deleted with the slice.
SHARED=yes
# local: hosts get a copy of this repository; git: they clone SOURCE_URL of
# host.sh.
SOURCE=local
# Files of the repository that the command names.
FILES=(
  configs/bn_x30.py
)
# Further flags of gcloud: to create the slice; for ssh and scp.
CREATE_FLAGS=(
)
SSH_FLAGS=(
)

# Creates a Cloud TPU slice, trains on it, and deletes it. Run it in the
# repository, with one of these words at a time:
#
#   create   requests the slice as a queued resource, and waits for it
#   set_up   copies the code to all hosts, mounts disks, and installs packages
#   train    starts the training loop on all hosts, in the background
#   keep     watches the slice: recreates it after a preemption and resumes
#            training; exits with the exit code of the run. With --delete it
#            deletes the slice once the run is done, has diverged or failed
#   state    prints the state of the slice and of each host
#   logs     follows the log of host 0
#   stop     saves and stops the run on all hosts
#   delete   deletes the slice, which is billed until then
set -euo pipefail
here=$(dirname "$0")
export CLOUDSDK_CORE_DISABLE_PROMPTS=1
# Seconds between two polls. They double after each failure; `keep` gives up
# after MOST_FAILURES without training in between, in about two hours.
INTERVAL=${INTERVAL:-30}
MOST_FAILURES=${MOST_FAILURES:-8}
# Seconds after which a poll, or the set-up of a recreated slice, has failed. Our
# choice.
LONGEST_POLL=${LONGEST_POLL:-300}
LONGEST_SET_UP=${LONGEST_SET_UP:-3600}
PLACE=(--project="$PROJECT" --zone="$ZONE")
DELETE="bash $(printf %q "$0") delete"

say() {
  echo "slice: $(date -u +%FT%TZ) $NAME: $*" >&2
}

# Counts a failure and waits, or gives up.
failures=0
fail() {
  failures=$((failures + 1))
  say "$1 (failure $failures of $MOST_FAILURES)"
  if [ "$failures" -ge "$MOST_FAILURES" ]; then
    say "error: giving up after $failures failures in a row. The slice may" \
      "still be billing. Delete it: $DELETE"
    exit 1
  fi
  sleep $((INTERVAL << failures))
}

# Exits with the exit code of the run, and first deletes the slice if asked to.
finish() {
  failures=0
  # As for train_loop.sh: 75 and codes above 128 are those of a run to resume.
  if [ -z "$delete" ] || [ "$1" -eq 75 ] || [ "$1" -gt 128 ]; then
    say "exit code $1. The slice is still billing. Delete it: $DELETE"
    exit "$1"
  fi
  until bash "$0" delete; do
    fail 'delete failed'
  done
  say "exit code $1. The slice is deleted"
  exit "$1"
}

# The two kinds of calls of gcloud. With LIMIT they fail after so many seconds.
queued_resources() {
  ${LIMIT:+timeout "$LIMIT"} gcloud compute tpus queued-resources "$1" "$NAME" \
    "${PLACE[@]}" "${@:2}"
}
tpu_vm() {
  ${LIMIT:+timeout "$LIMIT"} gcloud compute tpus tpu-vm "$1" "${@:2}" \
    "${PLACE[@]}" ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"}
}

# Runs a command on one host, or on all. The command must not need quoting.
on() {
  tpu_vm ssh "$NAME" --worker="$1" --command="$2"
}

# Prints the state of the queued resource, or NONE if it does not exist. Fails
# if the state is unknown.
state() {
  local said code=0
  said=$(
    LIMIT=$LONGEST_POLL queued_resources describe \
      --format='value(state.state)' 2>&1
  ) || code=$?
  if [ -z "$said" ] || [[ $code,$said == [!0]*,*NOT_FOUND* ]]; then
    echo NONE
  elif [ "$code" -eq 0 ]; then
    # Without the warnings of gcloud.
    grep -Exm 1 '[A-Z_]+' <<<"$said"
  else
    say "$(grep -m 1 ERROR <<<"$said" || tail -n 1 <<<"$said")"
    return 1
  fi
}

# Fails if a running ssh-agent does not hold gcloud's key. gcloud would refuse
# to connect to several hosts, but only once the slice exists and is billed.
check_agent() {
  local key=$HOME/.ssh/google_compute_engine held print
  [ "$HOSTS" -gt 1 ] && held=$(ssh-add -l 2>/dev/null) || return 0
  print=$(ssh-keygen -lf "$key" 2>/dev/null | cut -d ' ' -f 2) || true
  [ -z "$print" ] || [[ $held != *"$print"* ]] || return 0
  say "error: the ssh-agent does not hold gcloud's key. Run 'ssh-add $key'" \
    "(first 'ssh-keygen -t rsa -f $key' if the file does not exist)"
  exit 1
}

# Prints the exit code of the run: the highest exit code of the hosts' loops, in
# the output of `host.sh state`.
exit_code() {
  local code=0
  while [[ $1 =~ exit\ code\ ([0-9]+):\ exiting(.*) ]]; do
    [ "${BASH_REMATCH[1]}" -le "$code" ] || code=${BASH_REMATCH[1]}
    set -- "${BASH_REMATCH[2]}"
  done
  echo "$code"
}

usage() {
  sed -n '/^# Creates a Cloud/,/^set/s/^# \{0,1\}//p' "$0"
}

case " $* " in
  *' -h '* | *' --help '*)
    usage
    exit
    ;;
  ' create ' | ' set_up ' | ' set_up again ' | ' train ' | ' keep ') ;;
  ' keep --delete ' | ' state ' | ' logs ' | ' stop ' | ' delete ') ;;
  *)
    usage >&2
    exit 1
    ;;
esac
if ! command -v gcloud >/dev/null; then
  say "error: gcloud: not found. Install the Google Cloud CLI. The slice may" \
    "still be billing. Delete it: $DELETE"
  exit 1
fi

case $1 in
  create)
    options=(--node-id="$NAME" --accelerator-type="$ACCELERATOR_TYPE"
      --runtime-version="$RUNTIME_VERSION")
    [ "$SPOT" = no ] || options+=(--spot)
    check_agent
    disks=projects/$PROJECT/zones/$ZONE/disks
    [ -z "$DATA_DISK" ] ||
      options+=("--data-disk=source=$disks/$DATA_DISK,mode=read-only")
    now=$(state)
    [ "$now" != NONE ] || queued_resources create "${options[@]}" \
      ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"}
    while true; do
      now=$(state) || now=unknown
      case $now in
        ACTIVE) break ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING)
          say "error: the queued resource is $now. See 'gcloud compute tpus" \
            "queued-resources describe $NAME', then delete and create it again"
          exit 1
          ;;
        unknown | NONE)
          fail "the state of the slice is $now"
          ;;
        *)
          failures=0
          say "waiting, $now"
          sleep "$INTERVAL"
          ;;
      esac
    done
    ;;
  set_up)
    files=("$here/host.sh")
    if [ "$SOURCE" = local ]; then
      # A recreated slice gets the code of the first.
      if [ "${2:-}" != again ] || [ ! -e "$here/source.tgz" ]; then
        bash scripts/launch/pack.sh "$here/source" "${FILES[@]}"
        tar --create --gzip --file="$here/source.tgz" \
          --directory="$here/source" .
        rm -r "$here/source"
      fi
      files+=("$here/source.tgz")
    fi
    on all "mkdir -p $NAME"
    tpu_vm scp "${files[@]}" "$NAME:$NAME/" --worker=all
    on all "bash $NAME/host.sh set_up"
    ;;
  train | stop)
    on all "bash $NAME/host.sh $1"
    ;;
  logs)
    on 0 "bash $NAME/host.sh logs"
    ;;
  state)
    now=$(state)
    echo "$NAME: ${now/#NONE/does not exist}"
    [ "$now" != ACTIVE ] || on all "bash $NAME/host.sh state"
    ;;
  keep)
    delete=${2:+yes}
    if [ "$delete" = yes ] && [ "$SHARED" = no ]; then
      say 'error: --delete: the workdir is on the boot disk, and is deleted with' \
        'the slice. Launch with --workdir=gs://BUCKET/NAME'
      exit 1
    fi
    missing=no
    while true; do
      now=$(state) || now=unknown
      case $missing,$now in
        *,ACTIVE)
          missing=no
          if ! said=$(
            LIMIT=$LONGEST_POLL \
              on all "bash $NAME/host.sh state || echo : not running"
          ); then
            fail 'a host does not answer'
          elif [[ $said == *': ended: '* && $said != *': running: '* ]]; then
            # Once the loop of one host has exited, the others will.
            say "$said"
            finish "$(exit_code "$said")"
          elif [[ $said == *': not running'* && $said != *': ended: '* ]]; then
            # Hosts that are running are unaffected.
            if timeout "$LONGEST_SET_UP" bash "$0" set_up again &&
              timeout "$LONGEST_SET_UP" bash "$0" train; then
              fail 'a host was not training, and was started again'
            else
              fail 'set_up or train failed'
            fi
          elif [[ $said == *': running: '* ]]; then
            failures=0
            sleep "$INTERVAL"
          else
            fail 'the hosts do not say whether they are training'
          fi
          ;;
        *,SUSPENDED | *,FAILED | yes,NONE)
          say 'preempted, recreating the slice'
          missing=yes
          bash "$0" delete || true
          bash "$0" create || fail 'create failed'
          ;;
        *,unknown | *,NONE)
          fail "the state of the slice is $now"
          ;;
        *)
          say "$now"
          sleep "$INTERVAL"
          ;;
      esac
    done
    ;;
  delete)
    now=$(state) || now=unknown
    [ "$now" = NONE ] || queued_resources delete --force
    ;;
esac
