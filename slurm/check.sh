# What is wrong with a job, said before it is queued. `bash` in the place of sbatch, its options after the file:
#   bash slurm/icrl_8b.sbatch --account=A --partition=P [KEY=VALUE]...
# job.sh sources this outside of a job. Slurm is asked with --test-only; settings are checked as the job would do it.
options=()
while [[ ${1:-} == --* ]]; do options+=("$1"); shift; done

asked() {  # nodes: what the options say, or else the file's own lines
  { sed -n "s/^#SBATCH --$1=//p" "$0"; printf '%s\n' "${options[@]}" | sed -n "s/^--$1=//p"; } | tail -n 1
}

command -v sbatch > /dev/null || { echo "error: no sbatch here; run this on a login node" >&2; exit 2; }
if ! said=$(timeout 60 sbatch --test-only "${options[@]}" "$0" 2>&1); then
  echo "error: Slurm would not take $0 ${options[*]}: ${said//$'\n'/ }; \`sinfo -o '%P %D %G'\` lists partitions," \
    "\`sacctmgr show assoc user=\$USER\` accounts" >&2
  exit 2
fi

run_job() {
  local ranks=${ICRL_RANKS_PER_NODE:-$(asked gpus-per-node)} folder
  if [ -n "${ICRL_CONTAINER:-}" ] && ! "$python" -c 'import icrl_megatron.run.checks, icrl_recipes' 2> /dev/null; then
    echo "$said"
    echo "Slurm would take this; the settings are checked by the job, as icrl-megatron is installed in the container only"
    return
  fi
  folder=$(WORLD_SIZE=$(($(asked nodes) * ranks)) LOCAL_WORLD_SIZE=$ranks "$python" -m icrl_megatron.launch.job check "$@") || exit 2
  echo "$said"
  echo "Slurm and the trainer would take this; it would write to ${folder%%$'\n'*}"
}
# What else a file would start belongs into a job.
grep -q '^run_job' "$0" || { echo "$said"; exit 0; }
