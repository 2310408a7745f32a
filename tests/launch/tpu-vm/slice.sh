#!/usr/bin/env bash
# Written by scripts/launch.py, from scripts/launch/slice.sh.
NAME=bn-x30
PROJECT=PROJECT
ZONE=us-west4-a
ACCELERATOR_TYPE=v5litepod-16
RUNTIME_VERSION=v2-alpha-tpuv5-lite
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
#            training goes on; ends with the training
#   state    says how the slice and each host stand
#   logs     follows what host 0 says
#   stop     saves, and stops the training on all hosts
#   delete   gives the slice back, which costs until then
set -euo pipefail
here=$(dirname "$0")
export CLOUDSDK_CORE_DISABLE_PROMPTS=1
# Seconds between two looks.
INTERVAL=${INTERVAL:-30}
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

# What goes to the hosts is packed once: a slice made anew gets the same code.
pack() {
  [ ! -e "$here/source.tgz" ] || return 0
  local packed
  packed=$(mktemp)
  git ls-files -z --cached --others --exclude-standard |
    tar --create --gzip --null --files-from=- --file="$packed"
  mv "$packed" "$here/source.tgz"
}

case ${1:-} in
  create)
    options=(--node-id="$NAME" --accelerator-type="$ACCELERATOR_TYPE"
      --runtime-version="$RUNTIME_VERSION")
    [ "$SPOT" = no ] || options+=(--spot)
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
      pack
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
    while true; do
      now=$(state)
      case $missing,$now in
        *,ACTIVE)
          missing=no
          # A host that does not answer is asked again.
          training=$(on 0 "bash $NAME/host.sh state || echo : not running" ||
            true)
          case $training in
            *': ended: '*)
              say "$training"
              exit
              ;;
            *': not running')
              { bash "$0" set_up && bash "$0" train; } || say 'not set up yet'
              ;;
          esac
          ;;
        *,SUSPENDED | *,FAILED | yes,)
          say 'preempted: making it anew'
          missing=yes
          [ -z "$now" ] || bash "$0" delete || true
          bash "$0" create || say 'not there yet'
          continue
          ;;
        *)
          say "${now:-state unknown}"
          ;;
      esac
      sleep "$INTERVAL"
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
