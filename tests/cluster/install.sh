#!/usr/bin/env bash
# Installs Debian's Slurm where it is missing and this user may; says why not otherwise. Always ends with 0: the tests
# that need it are skipped with their reason.
set -u
for part in slurmctld slurmd slurmdbd sbatch munged mariadbd; do
  command -v "$part" > /dev/null || missing=${missing:+$missing }$part
done
[ -n "${missing:-}" ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
  echo "no $missing, and they cannot be installed from here (root and apt-get are needed): the cluster tests are skipped"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
{ timeout 120 apt-get update && timeout 240 apt-get install -y --no-install-recommends \
  slurm-wlm slurm-client slurmdbd mariadb-server munge curl; } > /tmp/icrl-slurm-install.log 2>&1 ||
  { echo "Slurm could not be installed: the cluster tests are skipped; apt said:"; tail -n 5 /tmp/icrl-slurm-install.log; }
