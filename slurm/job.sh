# The common part of all batch jobs, sourced by the .sbatch files: check, environment servers, step, stop, requeue, retry.
#   source slurm/job.sh; run_job train RECIPE [KEY=VALUE]...
# ICRL_PYTHON           the Python to use (default: .venv/bin/python if it exists, else python3)
# ICRL_CONTAINER        image for pyxis/enroot, ICRL_MOUNTS more mounts (container.sh); unset: bare metal
# ICRL_RANKS_PER_NODE   ranks per node (default: the number of GPUs that Slurm allocated)
# ICRL_BACK_OFF_S       wait before the first retry of a crash (30); doubles with each
# ICRL_PROLOGUE         a script to source first, such as one that loads modules; not in containers
# ICRL_SEEN_TIMEOUT_S   maximum delay until one node sees a file that another wrote (60; icrl_megatron/train.py)
set -uo pipefail
script=$(realpath "$0")  # in a batch job, a copy in Slurm's spool folder
if [ -n "${ICRL_PROLOGUE:-}" ]; then
  ICRL_PROLOGUE=$(realpath "$ICRL_PROLOGUE")
  set +u  # modules use unset variables
  # shellcheck disable=SC1090
  source "$ICRL_PROLOGUE" || { echo "error: ICRL_PROLOGUE=$ICRL_PROLOGUE failed: correct it, or unset it" >&2; exit 2; }
  set -u
fi
# The checkout: relative paths of settings are below it, from wherever the job is submitted.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

source slurm/container.sh
python=${ICRL_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ -z "${SLURM_JOB_ID:-}" ]; then
  source slurm/check.sh
  return
fi
export ICRL_RANKS_PER_NODE=${ICRL_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
export ICRL_LOGS=${ICRL_LOGS:-$PWD/runs/jobs}
state=$ICRL_LOGS/job.$SLURM_JOB_ID
mkdir -p "$state" || { echo "error: $ICRL_LOGS cannot be written; set ICRL_LOGS to a shared folder" >&2; exit 2; }
# Left by an earlier job, or a job of another cluster, with the same number.
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || rm -f "$state/state.json"
# Ranks write their outcome here; the file `stop` stops ranks that have not installed a signal handler yet.
export ICRL_OUTCOME=$state/outcome.json ICRL_STOP=$state/stop
# Environment servers write their addresses here; because this is set, steps start no servers of their own.
export ICRL_SERVERS=$state/servers.${SLURM_RESTART_COUNT:-0}
[ -z "${ICRL_CONTAINER:-}" ] || python=${ICRL_PYTHON:-python3}
export ICRL_PYTHON=$python
contain "$@"

# The last task of an array has the array's own job id, which Slurm would apply to all of its tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
steps=0 stopping=0 running='' train_step=0 servers='' server_step=0

forward_stop() {  # USR1 comes from --signal before the time limit, TERM from preemption
  stopping=1
  touch "$ICRL_STOP"
  if [ -n "$running" ]; then
    echo "stopping: the ranks of step $job.$train_step save first" >&2
    # In a container only the file stops the ranks: a signal to the step kills squashfuse, which may serve the image.
    [ ${#container[@]} -gt 0 ] || timeout 20 scancel --signal=USR1 "$job.$train_step"
  fi
}
trap forward_stop USR1 TERM

ask() {  # icrl_megatron.launch.job with these arguments in one process, in the container if there is one
  alone env ${ICRL_WORLD_SIZE:+ICRL_WORLD_SIZE="$ICRL_WORLD_SIZE"} "$python" -m icrl_megatron.launch.job "$@"
}
alone() {  # a command: runs it once, in the container if there is one
  if [ ${#container[@]} -gt 0 ]; then srun --nodes=1 --ntasks=1 --overlap "${container[@]}" "$@"; else "$@"; fi
}
counted() { [ ${#container[@]} -gt 0 ] && steps=$((steps + 1)); return 0; }  # in a container `ask` is a Slurm step

wait_for() {  # waits for a process; a trapped signal would end `wait` early
  local code
  while :; do
    wait "$1"; code=$?
    kill -0 "$1" 2> /dev/null || return "$code"
  done
}

start_servers() {  # train RECIPE [KEY=VALUE]...: starts the servers of tasks.sources[...].serve on the first node, as a separate step
  local first code log=$ICRL_SERVERS/step.log
  # Before a retry the addresses of the previous servers are removed; their logs are kept.
  mkdir -p "$ICRL_SERVERS"; rm -f "$ICRL_SERVERS/addresses.json"
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  srun --nodes=1 --ntasks=1 --nodelist="$first" --overlap --output="$log" "${container[@]}" \
    "$python" -m icrl_megatron.launch.servers "$ICRL_SERVERS" "$@" &
  servers=$! server_step=$steps
  steps=$((steps + 1))
  while [ ! -f "$ICRL_SERVERS/addresses.json" ] && kill -0 "$servers" 2> /dev/null; do sleep 1; done  # the process limits its own time
  cat "$log" >&2
  if ! grep -q '^{"servers"' "$ICRL_SERVERS/addresses.json"; then
    [ ! -f "$ICRL_SERVERS/addresses.json" ] || alone "$python" -m icrl_megatron.launch.job said "$ICRL_SERVERS/addresses.json"
    wait_for "$servers"; code=$?
    [ "$code" -ne 0 ] || code=1
    exit "$code"
  fi
}

end_servers() {
  [ -n "$servers" ] || return 0
  # Through Slurm, because a signal to srun kills the step. Nodes without that step report an error.
  timeout 20 scancel --signal=TERM "$job.$server_step" 2> /dev/null
  for _ in {1..25}; do kill -0 "$servers" 2> /dev/null || break; sleep 1; done
  kill "$servers" 2> /dev/null; wait_for "$servers"
  servers=''
}

cancelled() {  # succeeds if the job was cancelled: Slurm would requeue it
  [ "$(timeout 30 squeue --noheader --jobs="$job" --format=%T)" = COMPLETING ] || return 1
  echo "cancelled: not requeued" >&2
}

requeue() {
  for _ in 1 2 3; do timeout 30 scontrol requeue "$job" && return; sleep 5; done
  echo "error: Slurm did not requeue job $job; submit it again to resume from its last checkpoint" >&2
  exit 1
}

preempted() {  # on preemption only the step gets TERM; it kills pyxis's use_squashfuse, and the ranks with it
  [[ $(timeout 30 scontrol show job "$job") =~ PreemptTime=[0-9] ]]
}

run_job() {
  local checked folder code decision
  contain "$@"
  export ICRL_WORLD_SIZE=$((SLURM_NNODES * ICRL_RANKS_PER_NODE))
  if ! checked=$(ask check "$@"); then
    [ ${#container[@]} -eq 0 ] || echo "the message above is from the container $ICRL_CONTAINER, with the Python $python and" \
      "the mounts ${mounts[*]}; ICRL_PYTHON and ICRL_MOUNTS change these" >&2
    exit 2
  fi
  counted
  folder=${checked%%$'\n'*}
  unset ICRL_WORLD_SIZE  # the agent sets WORLD_SIZE
  [ "$checked" = "$folder" ] || start_servers "$@"
  while :; do
    [ -z "$servers" ] || kill -0 "$servers" 2> /dev/null || start_servers "$@"  # before a retry
    rm -f "$ICRL_OUTCOME"; [ "$stopping" = 1 ] || rm -f "$ICRL_STOP"
    train_step=$steps
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${container[@]}" bash slurm/step.sh "$@" &
    running=$!; steps=$((steps + 1))
    wait_for "$running"; code=$?; running=''
    [ "$code" -eq 0 ] || [ -f "$ICRL_OUTCOME" ] || ! preempted || stopping=1
    if [ "$code" -eq 0 ] && [ ! -f "$ICRL_OUTCOME" ]; then
      decision='done'  # known without `ask`, which is slow in a container
    else
      decision=$(ask decide "$ICRL_OUTCOME" "$state/state.json" "$code" "$stopping" "$@") || decision=fail
      counted
    fi
    case $decision in
      done) end_servers; exit 0 ;;
      requeue) end_servers; rm -f "$ICRL_STOP"; cancelled || requeue; exit 0 ;;
      retry*) echo "retrying in ${decision#retry } s" >&2; sleep "${decision#retry }" & wait_for $! ;;
      *) end_servers; [ "$code" -ne 0 ] || code=1; [ -f "$ICRL_OUTCOME" ] && grep -q '"code": 2' "$ICRL_OUTCOME" && code=2; exit "$code" ;;
    esac
  done
}
