# What every batch job does, sourced by the .sbatch files: check, environment servers, the step, stop, requeue, retry.
#   source slurm/job.sh; run_job train RECIPE [KEY=VALUE]...
# ICRL_PYTHON           the Python to use (default: .venv/bin/python where there is one, else python3)
# ICRL_CONTAINER        image for pyxis/enroot (ICRL_MOUNTS: more mounts); unset: bare metal
# ICRL_RANKS_PER_NODE   ranks on a node (default: the GPUs that Slurm gave)
# ICRL_ENV_COMMAND      starts environment servers on the first node beside the job, listening on $ICRL_ENV_PORT
# ICRL_ENV_OVERRIDE     setting that is told of them (default: tasks.sources.0.data.servers=[URL])
# ICRL_ENV_TIMEOUT_S    how long they may take to answer (600)
set -uo pipefail
# In a batch job $0 is a copy in Slurm's spool folder.
cd "${SLURM_SUBMIT_DIR:?run this with sbatch}" || exit 2

python=${ICRL_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export ICRL_RANKS_PER_NODE=${ICRL_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
export ICRL_LOGS=${ICRL_LOGS:-$PWD/runs/jobs}
state=$ICRL_LOGS/job.$SLURM_JOB_ID
mkdir -p "$state" || { echo "error: $ICRL_LOGS cannot be written; set ICRL_LOGS to a shared folder" >&2; exit 2; }
# Ranks leave what happened here; the file `stop` reaches those that are not listening to signals yet.
export ICRL_OUTCOME=$state/outcome.json ICRL_STOP=$state/stop
container=()
if [ -n "${ICRL_CONTAINER:-}" ]; then
  container=(--container-image="$ICRL_CONTAINER" --container-mounts="$PWD:$PWD${ICRL_MOUNTS:+,$ICRL_MOUNTS}" --container-workdir="$PWD")
  python=${ICRL_PYTHON:-python3}
fi
export ICRL_PYTHON=$python

# The last task of an array has the array's own number: whoever names that, means all of its tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
steps=0 stopping=0 running='' train_step=0 servers=''

forward_stop() {  # USR1 comes from --signal before the time limit, TERM from preemption
  stopping=1
  touch "$ICRL_STOP"
  if [ -n "$running" ]; then
    echo "stopping: the ranks of step $job.$train_step save first" >&2
    timeout 20 scancel --signal=USR1 "$job.$train_step"
  fi
}
trap forward_stop USR1 TERM

ask() {  # the job's own questions, one process, in the container where there is one
  if [ ${#container[@]} -gt 0 ]; then
    srun --nodes=1 --ntasks=1 --overlap "${container[@]}" "$python" -m icrl_megatron.job "$@"
  else
    "$python" -m icrl_megatron.job "$@"
  fi
}
counted() { [ ${#container[@]} -gt 0 ] && steps=$((steps + 1)); return 0; }  # `ask` was a step then

wait_for() {  # a trapped signal ends `wait` before its process has ended
  local code
  while :; do
    wait "$1"; code=$?
    kill -0 "$1" 2> /dev/null || return "$code"
  done
}

start_servers() {
  [ -n "${ICRL_ENV_COMMAND:-}" ] || return 0
  export ICRL_ENV_PORT=${ICRL_ENV_PORT:-$((40000 + SLURM_JOB_ID % 20000))}
  local first url deadline
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  url=http://$first:$ICRL_ENV_PORT
  srun --nodes=1 --ntasks=1 --nodelist="$first" --overlap --output="$state/environments.log" \
    bash -c "$ICRL_ENV_COMMAND" &
  servers=$!
  steps=$((steps + 1))
  deadline=$((SECONDS + ${ICRL_ENV_TIMEOUT_S:-600}))
  until curl --silent --output /dev/null --max-time 5 "$url/"; do
    if ! kill -0 "$servers" 2> /dev/null || [ "$SECONDS" -gt "$deadline" ]; then
      echo "error: no environment server answers at $url; $state/environments.log ends with:" >&2
      tail -n 20 "$state/environments.log" >&2
      end_servers
      exit 1
    fi
    sleep 1
  done
  echo "environment servers at $url"
  settings+=("${ICRL_ENV_OVERRIDE:-tasks.sources.0.data.servers=[$url]}")
}

end_servers() { [ -z "$servers" ] || { kill "$servers" 2> /dev/null; wait_for "$servers"; servers=''; }; return 0; }

run_job() {
  local folder code decision token
  settings=("$@")
  export WORLD_SIZE=$((SLURM_NNODES * ICRL_RANKS_PER_NODE))
  if ! folder=$(ask check "$@"); then exit 2; fi
  counted
  unset WORLD_SIZE  # torchrun's own to set
  if [ "$SLURM_NNODES" -gt 1 ]; then
    mkdir -p "$folder"; token=.seen.$SLURM_JOB_ID; touch "$folder/$token"
    srun --ntasks-per-node=1 "${container[@]}" "$python" -m icrl_megatron.job seen "$folder" "$token" || exit 2
    steps=$((steps + 1)); rm -f "$folder/$token"
  fi
  start_servers
  while :; do
    rm -f "$ICRL_OUTCOME"; [ "$stopping" = 1 ] || rm -f "$ICRL_STOP"
    train_step=$steps
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${container[@]}" bash slurm/step.sh "${settings[@]}" &
    running=$!; steps=$((steps + 1))
    wait_for "$running"; code=$?; running=''
    decision=$(ask decide "$folder" "$ICRL_OUTCOME" "$state/state.json" "$code" "$stopping") || decision=fail
    counted
    case $decision in
      done) end_servers; exit 0 ;;
      requeue) end_servers; rm -f "$ICRL_STOP"; timeout 30 scontrol requeue "$job"; exit 0 ;;
      retry*) echo "trying again in ${decision#retry } s" >&2; sleep "${decision#retry }" & wait_for $! ;;
      *) end_servers; [ "$code" -ne 0 ] || code=1; [ -f "$ICRL_OUTCOME" ] && grep -q '"code": 2' "$ICRL_OUTCOME" && code=2; exit "$code" ;;
    esac
  done
}
