#!/usr/bin/env bash
# Written by scripts/launch.py, from scripts/launch/slice.sh.
NAME=@name@
PROJECT=@project@
ZONE=@zone@
ACCELERATOR_TYPE=@accelerator_type@
RUNTIME_VERSION=@runtime_version@
HOSTS=@num_hosts@
SPOT=@spot@
# Disk of this project and zone that all hosts read; may be empty.
DATA_DISK=@data@
# local: hosts get a copy of this repository; git: they clone SOURCE_URL of
# host.sh.
SOURCE=@source@

# Creates a Cloud TPU slice, trains on it, and deletes it. Run it in the
# repository, with one of these words at a time:
#
#   create   requests the slice as a queued resource, and waits for it
#   set_up   copies the code to all hosts, mounts disks, and installs packages
#   train    starts the training loop on all hosts, in the background
#   keep     watches the slice: recreates it after a preemption and resumes
#            training; exits with the exit code of the run
#   state    prints the state of the slice and of each host
#   logs     follows the log of host 0
#   stop     saves and stops the run on all hosts
#   delete   deletes the slice, which is billed until then
set -euo pipefail
here=$(dirname "$0")
export CLOUDSDK_CORE_DISABLE_PROMPTS=1
# Seconds between two polls, which double after each failure to recreate the
# slice or to set it up. `keep` gives up after MOST_FAILURES in a row, in about
# two hours.
INTERVAL=${INTERVAL:-30}
MOST_FAILURES=${MOST_FAILURES:-8}
PLACE=(--project="$PROJECT" --zone="$ZONE")

say() {
  echo "slice: $(date -u +%FT%TZ) $NAME: $*" >&2
}

queued_resources() {
  gcloud compute tpus queued-resources "$1" "$NAME" "${PLACE[@]}" "${@:2}"
}

# Runs a command on one host, or on all. The command must not need quoting.
on() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker="$1" \
    --command="$2"
}

# Prints the state of the queued resource, or nothing if it does not exist or
# its state is unknown.
state() {
  queued_resources describe --format='value(state.state)' 2>/dev/null || true
}

# Packs the files of the working tree that git does not ignore. REVISION names
# their revision, since hosts get no git history.
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
          say "error: the queued resource is $now. See 'gcloud compute tpus" \
            "queued-resources describe $NAME', then delete and create it again"
          exit 1
          ;;
      esac
      say "waiting, ${now:-state unknown}"
      sleep "$INTERVAL"
    done
    ;;
  set_up)
    files=("$here/host.sh")
    if [ "$SOURCE" = local ]; then
      # A recreated slice gets the code of the first.
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
    echo "$NAME: ${now:-does not exist}"
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
          # A host that does not answer is polled again.
          said=$(on all "bash $NAME/host.sh state || echo : not running") ||
            said=
          case $said in
            *': ended: '*)
              # Once the loop of one host has exited, the others will.
              if [[ $said != *': running: '* ]]; then
                say "$said"
                exit "$(exit_code "$said")"
              fi
              ;;
            *': not running'*)
              # Hosts that are running are unaffected.
              if bash "$0" set_up again && bash "$0" train; then
                failures=0
              else
                failed='set_up or train failed'
              fi
              ;;
          esac
          ;;
        *,SUSPENDED | *,FAILED | yes,)
          say 'preempted, recreating the slice'
          missing=yes
          [ -z "$now" ] || bash "$0" delete || true
          if bash "$0" create; then
            failures=0
          else
            failed='create failed'
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
          say "error: giving up after $failures failures. A slice is billed" \
            "until it is deleted; see '$0 state'"
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
    sed -n '/^# Creates a Cloud/,/^set/s/^# \{0,1\}//p' "$0"
    exit 1
    ;;
esac
