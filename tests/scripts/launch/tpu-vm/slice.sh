#!/usr/bin/env bash
# Written by scripts/launch.py, from scripts/launch/slice.sh.
NAME=bn-x30
PROJECT=PROJECT
ZONE=us-west4-a
ACCELERATOR_TYPE=v5litepod-16
RUNTIME_VERSION=v2-alpha-tpuv5-lite
HOSTS=4
SPOT=yes
# A disk of this project and zone that all hosts read, or none.
DATA_DISK=imagenet
# local: the hosts get a copy of this repository; git: they clone what host.sh
# says.
SOURCE=local

# Asks for a slice of a Cloud TPU, trains on it, and gives it back. Run it in the
# repository, once for each word:
#
#   create   asks for the slice as a queued resource, and waits until it is there
#   set_up   copies code to all hosts, mounts, and installs
#   train    starts the training loop on all hosts, which goes on by itself
#   keep     watches: a slice that was preempted is deleted and made anew, and
#            training goes on; ends with the training, and as it does
#   state    says how the slice and each host stand
#   logs     follows what host 0 says
#   stop     saves, and stops the training on all hosts
#   delete   gives the slice back, which costs until then
set -euo pipefail
here=$(dirname "$0")
export CLOUDSDK_CORE_DISABLE_PROMPTS=1
# Seconds between two looks; twice as many after each failure to make a slice
# anew or to set it up, and so many failures in a row, in about two hours, end it.
INTERVAL=${INTERVAL:-30}
MOST_FAILURES=${MOST_FAILURES:-8}
PLACE=(--project="$PROJECT" --zone="$ZONE")

say() {
  echo "slice: $(date -u +%FT%TZ) $NAME: $*" >&2
}

queued_resources() {
  gcloud compute tpus queued-resources "$1" "$NAME" "${PLACE[@]}" "${@:2}"
}

# Runs a command on a host, or on all. It holds nothing that needs quoting.
on() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker="$1" \
    --command="$2"
}

# Empty if there is none, or if it cannot be found out.
state() {
  queued_resources describe --format='value(state.state)' 2>/dev/null || true
}

# What goes to the hosts: the files that git knows, or would, and are there; and
# which revision they are, since they come without their history.
pack() {
  local folder
  folder=$(mktemp -d)
  git describe --always --dirty --abbrev=40 >"$folder/REVISION"
  git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      [ ! -e "$file" ] || printf '%s\0' "$file"
    done |
    tar --create --gzip --file="$folder/source.tgz" \
      --directory="$folder" REVISION --directory="$PWD" \
      --null --files-from=-
  mv "$folder/source.tgz" "$here/source.tgz"
  rm -r "$folder"
}

# With an agent that lacks its key gcloud refuses to talk to several hosts, which
# would come out when the slice is there and paid for.
check_agent() {
  local key=$HOME/.ssh/google_compute_engine held print
  [ "$HOSTS" -gt 1 ] && held=$(ssh-add -l 2>/dev/null) || return 0
  print=$(ssh-keygen -lf "$key" 2>/dev/null | cut -d ' ' -f 2) || true
  [ -z "$print" ] || [[ $held != *"$print"* ]] || return 0
  say "error: the ssh-agent here does not hold gcloud's key. Use 'ssh-add" \
    "$key' (after 'ssh-keygen -t rsa -f $key' if there is none)"
  exit 1
}

# The exit code of the run: the highest of those with which the hosts' loops have
# ended, in the lines of `state`.
exit_code() {
  local code=0
  while [[ $1 =~ exit\ code\ ([0-9]+):\ ends(.*) ]]; do
    [ "${BASH_REMATCH[1]}" -le "$code" ] || code=${BASH_REMATCH[1]}
    set -- "${BASH_REMATCH[2]}"
  done
  echo "$code"
}

case ${1:-} in
  create)
    options=(--node-id="$NAME" --accelerator-type="$ACCELERATOR_TYPE"
      --runtime-version="$RUNTIME_VERSION")
    [ "$SPOT" = no ] || options+=(--spot)
    check_agent
    disks=projects/$PROJECT/zones/$ZONE/disks
    [ -z "$DATA_DISK" ] ||
      options+=("--data-disk=source=$disks/$DATA_DISK,mode=read-only")
    [ -n "$(state)" ] || queued_resources create "${options[@]}"
    while true; do
      now=$(state)
      case $now in
        ACTIVE) break ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING)
          say "error: $now. See 'gcloud compute tpus queued-resources" \
            "describe', delete it and create it again"
          exit 1
          ;;
      esac
      say "${now:-state unknown}, waiting"
      sleep "$INTERVAL"
    done
    ;;
  set_up)
    files=("$here/host.sh")
    if [ "$SOURCE" = local ]; then
      # A slice made anew gets the code that the one before had.
      [ "${2:-}" = again ] && [ -e "$here/source.tgz" ] || pack
      files+=("$here/source.tgz")
    fi
    on all "mkdir -p $NAME"
    gcloud compute tpus tpu-vm scp "${files[@]}" "$NAME:$NAME/" "${PLACE[@]}" \
      --worker=all
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
    echo "$NAME: ${now:-not there}"
    [ "$now" != ACTIVE ] || on all "bash $NAME/host.sh state"
    ;;
  keep)
    missing=no
    failures=0
    while true; do
      now=$(state)
      failed=
      case $missing,$now in
        *,ACTIVE)
          missing=no
          # A host that does not answer is asked again.
          said=$(on all "bash $NAME/host.sh state || echo : not running") ||
            said=
          case $said in
            *': ended: '*)
              # Where one host's loop has ended, the others' will.
              if [[ $said != *': running: '* ]]; then
                say "$said"
                exit "$(exit_code "$said")"
              fi
              ;;
            *': not running'*)
              # Again does no harm to the hosts on which it runs.
              if bash "$0" set_up again && bash "$0" train; then
                failures=0
              else
                failed='not set up yet'
              fi
              ;;
          esac
          ;;
        *,SUSPENDED | *,FAILED | yes,)
          say 'preempted: making it anew'
          missing=yes
          [ -z "$now" ] || bash "$0" delete || true
          if bash "$0" create; then
            failures=0
          else
            failed='not there yet'
          fi
          ;;
        *)
          say "${now:-state unknown}"
          ;;
      esac
      if [ -n "$failed" ]; then
        failures=$((failures + 1))
        say "$failed"
        if [ "$failures" -ge "$MOST_FAILURES" ]; then
          say "error: given up after $failures failures. What is there costs" \
            "until it is deleted: see '$0 state'"
          exit 1
        fi
      fi
      sleep $((INTERVAL << failures))
    done
    ;;
  delete)
    queued_resources delete --force
    ;;
  *)
    sed -n '/^# Asks/,/^set/s/^# \{0,1\}//p' "$0"
    exit 1
    ;;
esac
