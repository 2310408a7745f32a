#!/usr/bin/env bash
# Copies the code that hosts need into FOLDER, and prints how much it is. Run it
# in the repository:
#
#   bash scripts/launch/pack.sh FOLDER [FILE ...]
#
# The code is the files that git tracks, as they are in the working tree, and
# each FILE, such as a config that git does not track. Outside a git checkout it
# is the package, the configs, the scripts and the requirements. REVISION names
# the revision, since hosts get no git history.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 1
}

case " $* " in
  *' -h '* | *' --help '*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
    ;;
  '  ') fail 'no folder given; see --help' ;;
esac
[ -e scripts/launch/pack.sh ] || fail 'run this in the repository'
folder=$1
shift
[ ! -e "$folder" ] || [ -e "$folder/REVISION" ] ||
  fail "$folder: exists, and is not a copy of the code. Remove it"

code=$(mktemp -d)
trap 'rm -rf "$code"' EXIT
# In a folder of another repository, git would list that repository's files.
if inside=$(git rev-parse --show-prefix 2>/dev/null) && [ -z "$inside" ] &&
  git ls-files --error-unmatch bn_repro >/dev/null 2>&1; then
  what='the files that git tracks'
  revision=$(git rev-parse HEAD)
  # As run_info.git_revision does.
  git diff --quiet HEAD -- . ':!results' || revision+=-dirty
  echo "$revision" >"$code/REVISION"
  list() {
    git ls-files -z --cached
  }
  others=$(git ls-files --others --exclude-standard | wc -l)
  [ "$others" -eq 0 ] || what+=", not $((others)) others: git add adds them"
else
  what='no checkout of git: bn_repro, configs, scripts and the requirements'
  [ ! -e REVISION ] || cp REVISION "$code"
  touch "$code/REVISION"
  list() {
    find bn_repro configs scripts pyproject.toml requirements*.txt -type f \
      ! -name '*.pyc' -print0
  }
fi
{
  list
  [ $# -eq 0 ] || printf '%s\0' "$@"
} | sort -zu | while IFS= read -r -d '' file; do
  # A deleted file is still tracked.
  [ ! -e "$file" ] && [ ! -L "$file" ] || printf '%s\0' "$file"
done | tar --create --null --no-recursion --files-from=- |
  tar --extract --directory="$code"
# With this file SkyPilot does not look for files that git ignores, as it ignores
# the folders of launches.
touch "$code/.skyignore"
rm -rf "$folder"
mkdir -p "$(dirname "$folder")"
mv "$code" "$folder"
count=$(find "$folder" -type f | wc -l)
size=$(du -sh "$folder" | cut -f 1)
echo "code: $((count)) files, $size ($what)" >&2
