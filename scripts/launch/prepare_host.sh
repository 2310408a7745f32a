#!/usr/bin/env bash
# Prepares one host of a TPU slice for training. Run on every one, in the
# repository, by what `scripts/launch.py` writes; again does no harm.
#
#   WORKDIR        where the run is written
#   WORKDIR_MOUNT  SERVER:/SHARE to mount by NFS above it, such as Filestore
#   DATA_DIR       where the data set lies, if the config says
#   DATA_DISK      if set, the disk that is attached is mounted there, read-only
#   HOSTS, SPOT    of the slice: how many hosts, and yes or no
set -euo pipefail

fail() {
  echo "error: $(hostname): $*" >&2
  exit 1
}

share=$(dirname "$WORKDIR")
if [ -n "$WORKDIR_MOUNT" ] && ! mountpoint -q "$share"; then
  command -v mount.nfs >/dev/null || {
    # A host that has just started may be installing updates.
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y nfs-common
  }
  sudo mkdir -p "$share"
  # Hosts must see at once what another has written, and what it has made.
  sudo mount -t nfs -o hard,sync,lookupcache=positive "$WORKDIR_MOUNT" "$share" ||
    fail "$WORKDIR_MOUNT could not be mounted on $share"
  [ -w "$share" ] ||
    sudo install -d -o "$(id -u)" -g "$(id -g)" "$WORKDIR"
fi
mkdir -p "$WORKDIR" 2>/dev/null ||
  fail "$WORKDIR cannot be made. Mount a folder that all hosts share on" \
    "$share, or launch with --workdir_mount=SERVER:/SHARE"
if [ "$(stat -c %d "$WORKDIR")" = "$(stat -c %d /)" ]; then
  [ "$HOSTS" -eq 1 ] ||
    fail "$WORKDIR is a folder of this host alone, and $HOSTS hosts have to" \
      "share it. Launch with --workdir_mount=SERVER:/SHARE"
  [ "$SPOT" = no ] ||
    fail "$WORKDIR lies on the boot disk, which a spot slice loses. Launch" \
      "with --workdir_mount=SERVER:/SHARE"
  echo "warning: $WORKDIR lies on the boot disk, and is deleted with the slice" >&2
fi

if [ -n "$DATA_DISK" ] && ! mountpoint -q "$DATA_DIR"; then
  # Of all file systems here the only one that is not mounted.
  device=$(sudo lsblk -rpno NAME,FSTYPE,MOUNTPOINT |
    awk '$2 == "ext4" && $3 == "" { print $1; exit }')
  [ -n "$device" ] || fail "$DATA_DISK is not attached, or not in ext4"
  sudo mkdir -p "$DATA_DIR"
  # Its journal cannot be replayed: the disk cannot be written.
  sudo mount -o ro,noload "$device" "$DATA_DIR" ||
    fail "$device could not be mounted on $DATA_DIR"
fi
[ -z "$DATA_DIR" ] || [ -d "$DATA_DIR" ] ||
  fail "--config.data.data_dir=$DATA_DIR is not there"

# The images of TPU VMs come with Python 3.10.
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  python3 -m pip install --quiet --user uv==0.13.9
  python3 -m uv python install --quiet 3.11
  PYTHON=$(python3 -m uv python find 3.11)
  export PYTHON
fi
source scripts/environment.sh
use_environment requirements-tpu.txt
