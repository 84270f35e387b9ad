#!/usr/bin/env bash
# One node's part of a job, with the only line that starts ranks. srun and NeMo-Run run it once per node; it also runs alone.
#   slurm/step.sh train RECIPE [KEY=VALUE]...
# ICRL_PYTHON            the Python to use (default: .venv/bin/python if it exists, else python3)
# ICRL_RANKS_PER_NODE    ranks on this node (default: the number of its GPUs), those that serve engines (launch.engine_ranks) included
# ICRL_EXIT_STOPPED      exit code if the ranks stopped on request and saved (0); job.sh, NeMo-Run and Kubernetes use 75
# Outside of Slurm (kubernetes/): ICRL_NODES, this node's number in JOB_COMPLETION_INDEX, MASTER_ADDR, and for files that
# nodes and restarts share, the job's name ICRL_JOB and the number of restarts ICRL_RESTART
set -euo pipefail

# A signal to the step reaches all of its processes: this shell and the agent ignore USR1 (time limit) and TERM
# (preemption); the ranks save once on either of them.
trap '' USR1 TERM

# NeMo-Run starts steps in its own folder.
cd "${ICRL_HOME:-.}"
# In a container whose image has PYTORCH_VERSION, pyxis sets these as if each task were a rank.
unset RANK LOCAL_RANK WORLD_SIZE
# The packages of the checkout, not those installed in an image.
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/recipes${PYTHONPATH:+:$PYTHONPATH}
python=${ICRL_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
ranks=${ICRL_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-$( (nvidia-smi -L 2> /dev/null || true) | wc -l)}}
if [ "$ranks" -lt 1 ]; then
  echo "error: no GPU on $(hostname): set ICRL_RANKS_PER_NODE to the number of ranks" >&2
  exit 2
fi
nodes=${ICRL_NODES:-${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}}
node=${SLURM_NODEID:-${JOB_COMPLETION_INDEX:-0}}
job=${ICRL_JOB:-${SLURM_JOB_ID:-}}
restart=${ICRL_RESTART:-${SLURM_RESTART_COUNT:-0}}
if [ "$nodes" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
  # The first host of e.g. rack[2-3]n[01,07-09],login; images have no scontrol.
  MASTER_ADDR=$(sed -E 's/\[([^],-]*)[^]]*\]/\1/g; s/,.*//' <<< "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}")
fi
# On one node the rendezvous is on loopback, at a port that the agent chooses; on several nodes the port is derived from
# the job id, so that two jobs on one node use different ports (docs/SECURITY.md lists the ports).
meet=()
if [ "$nodes" -gt 1 ]; then
  meet=("--master-addr=$MASTER_ADDR" "--master-port=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-$$} % 20000))}")
fi

# A rank whose peer died must end instead of waiting until the job's time limit.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# Warnings only; set NCCL_DEBUG=INFO from outside to debug a hang.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# NVLink SHARP reserves memory for every communicator; the engine's cache needs this memory.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
# NCCL's own virtual-memory allocations cannot be shared with an engine by CUDA IPC.
export NCCL_CUMEM_ENABLE=${NCCL_CUMEM_ENABLE:-0}
# Kernels start in the order in which they were issued: Megatron needs this to overlap tensor-parallel collectives.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Expandable segments cannot be paused, and putting an engine to sleep pauses its memory.
unset PYTORCH_CUDA_ALLOC_CONF
# One thread per core of each rank.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + ranks - 1) / ranks ))}
# Forked tokenizer threads deadlock.
export TOKENIZERS_PARALLELISM=false

# Files of the job that its nodes, retries and requeues share: outcome.json (the agent maps all failure codes of ranks to
# 1), ended (written by job.sh: exit code of the step, and whether a stop was requested), state.json, given_up.
logs=${ICRL_LOGS:-runs/jobs}
state=$logs/job.${job:-$$}
mkdir -p "$state"

give_up() {  # code: prevents further runs of the job
  # Without a script of ours around the step, the launcher would requeue the job.
  if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${ICRL_AGAIN:-}" ] && command -v scontrol > /dev/null; then
    timeout 30 scontrol update JobId="$SLURM_JOB_ID" Requeue=0 || true
  fi
  echo "$1" > "$state/given_up"  # for scripts around the step: job.sh, and NeMo-Run's outside of a container
  exit "$1"
}
# The first node decides whether the job runs again, from how its previous run ended.
again=${ICRL_AGAIN:-$((restart > 0))}
if [ "$node" -eq 0 ]; then
  if [ "$again" = 1 ]; then
    # Without `ended`, job.sh was itself killed, by a preemption or a failed node; other launchers write none.
    ended=$(cat "$state/ended" 2> /dev/null || echo "1 ${ICRL_AGAIN:-0}")
    # shellcheck disable=SC2086  # two words
    decision=$("$python" -m icrl_megatron.launch.job decide "$state/outcome.json" "$state/state.json" $ended "$@") || decision=fail
    case $decision in
      retry*) sleep "${decision#retry }" ;;
      fail) give_up 1 ;;
    esac
  else
    rm -f "$state"/{state.json,given_up}  # of an earlier job, or a job of another cluster, with the same number
  fi
  rm -f "$state"/{outcome.json,ended}
fi

# The first node starts the recipe's environment servers beside its ranks.
servers=''
export ICRL_SERVERS=$state/servers.$restart
if [ "$node" -eq 0 ]; then
  rm -f "$ICRL_SERVERS/addresses.json"  # of earlier servers; their logs are kept
  ICRL_PARENT=$$ "$python" -m icrl_megatron.launch.servers "$ICRL_SERVERS" "$@" &
  servers=$!
fi

code=0
ICRL_OUTCOME=$state/outcome.json "$python" -m icrl_megatron.launch.agent \
  --nnodes="$nodes" --node-rank="$node" --nproc-per-node="$ranks" "${meet[@]}" \
  -m icrl_megatron.launch.rank "$@" || code=$?
[ -z "$servers" ] || { kill "$servers" 2> /dev/null; wait "$servers"; } || true

if [ -f "$state/outcome.json" ]; then
  case $(cat "$state/outcome.json") in
    *'"code": 1'* | *'"code": 2'*)
      [ "$node" -ne 0 ] || "$python" -m icrl_megatron.launch.job said "$state/outcome.json"
      case $(cat "$state/outcome.json") in *'"code": 2'*) give_up 2 ;; *) give_up 1 ;; esac ;;
    *'"code": 3'*) code=${ICRL_EXIT_STOPPED:-0} ;;  # stopped on request: the caller decides about a requeue
  esac
fi
exit "$code"
