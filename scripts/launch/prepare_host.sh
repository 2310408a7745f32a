#!/usr/bin/env bash
# Prepares a host of a TPU slice for training. The files that scripts/launch.py
# writes run it on every host, in the repository. It can be run repeatedly.
#
#   WORKDIR        workdir of the run, a path or gs://BUCKET/NAME
#   WORKDIR_MOUNT  NFS share, such as Filestore, to mount on the folder above
#                  WORKDIR, as SERVER:/SHARE; may be empty
#   DATA_DIR       folder of the data set; may be empty
#   DATA_DISK      attached disk to mount on DATA_DIR, read-only; may be empty
#   HOSTS          number of hosts of the slice
#   SPOT           yes if the slice may be preempted, otherwise no
set -euo pipefail

case ${1:-} in
  -h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
    ;;
esac

fail() {
  echo "error: $(hostname): $*" >&2
  exit 1
}

if [[ $WORKDIR != gs://* ]]; then
  share=$(dirname "$WORKDIR")
  if [ -n "$WORKDIR_MOUNT" ] && ! mountpoint -q "$share"; then
    command -v mount.nfs >/dev/null || {
      # A host may install updates, and hold the lock, just after its start.
      sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
      sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y nfs-common
    }
    sudo mkdir -p "$share"
    # A host must see at once the files that another host has written or created.
    sudo mount -t nfs -o hard,sync,lookupcache=positive "$WORKDIR_MOUNT" "$share" ||
      fail "mounting $WORKDIR_MOUNT on $share failed. Check that the server is" \
        "reachable and exports the share"
    [ -w "$share" ] ||
      sudo install -d -o "$(id -u)" -g "$(id -g)" "$WORKDIR"
  fi
  mkdir -p "$WORKDIR" 2>/dev/null ||
    fail "$WORKDIR cannot be created. Mount a shared folder on $share, or" \
      "launch with --workdir=gs://BUCKET/NAME"
  if [ "$(stat -c %d "$WORKDIR")" = "$(stat -c %d /)" ]; then
    [ "$HOSTS" -eq 1 ] ||
      fail "$WORKDIR is local to this host, but $HOSTS hosts must share it." \
        "Launch with --workdir=gs://BUCKET/NAME"
    [ "$SPOT" = no ] ||
      fail "$WORKDIR is on the boot disk, which is lost when a spot slice is" \
        "preempted. Launch with --workdir=gs://BUCKET/NAME"
    echo "warning: $WORKDIR is on the boot disk and is deleted with the slice" >&2
  fi
fi

if [ -n "$DATA_DISK" ] && ! mountpoint -q "$DATA_DIR"; then
  # The disk holds the only ext4 file system that is not mounted.
  device=$(sudo lsblk -rpno NAME,FSTYPE,MOUNTPOINT |
    awk '$2 == "ext4" && $3 == "" { print $1; exit }')
  [ -n "$device" ] || fail "disk $DATA_DISK is not attached, or holds no" \
    "ext4 file system. Attach it, or launch without --data_disk"
  sudo mkdir -p "$DATA_DIR"
  # `noload`: the journal of a read-only disk cannot be replayed.
  sudo mount -o ro,noload "$device" "$DATA_DIR" ||
    fail "mounting $device on $DATA_DIR failed. Check that $DATA_DISK holds" \
      "an ext4 file system that was unmounted cleanly"
fi
[ -z "$DATA_DIR" ] || [ -d "$DATA_DIR" ] ||
  fail "--config.data.data_dir=$DATA_DIR does not exist on this host. Mount" \
    "the data there"

# Images of TPU VMs have Python 3.10.
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  python3 -m pip install --quiet --user uv==0.13.9
  python3 -m uv python install --quiet 3.11
  PYTHON=$(python3 -m uv python find 3.11)
  export PYTHON
fi
source scripts/environment.sh
use_environment requirements-tpu.txt

# The client for buckets is among the requirements.
if [[ $WORKDIR == gs://* ]]; then
  python scripts/launch/check_bucket.py --workdir="$WORKDIR"
fi
