#!/usr/bin/env bash
# debian.sh "WHOSE TESTS" "PROGRAM..." "PACKAGE...": installs Debian packages where one of the programs is missing and this
# user may; says why not otherwise. Always ends with 0: the tests that need them are skipped with their reason.
set -u
whose=$1 programs=$2 packages=$3
for program in $programs; do
  command -v "$program" > /dev/null || missing=${missing:+$missing }$program
done
[ -n "${missing:-}" ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
  echo "no $missing, and they cannot be installed from here (root and apt-get are needed): $whose are skipped"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
echo "installing $packages"
# shellcheck disable=SC2086  # words
{ timeout 120 apt-get update && timeout 240 apt-get install -y --no-install-recommends $packages; } > "$log" 2>&1 ||
  { echo "$packages could not be installed: $whose are skipped; apt said:"; tail -n 5 "$log"; }
rm -f "$log"
