#!/usr/bin/env bash
# One node's share of a job: the only line that starts ranks. `srun` starts it once a node, NeMo-Run too, and a laptop may.
#   slurm/step.sh train RECIPE [KEY=VALUE]...
# ICRL_PYTHON            the Python to use (default: .venv/bin/python where there is one, else python3)
# ICRL_RANKS_PER_NODE    ranks on this node (default: its GPUs)
set -euo pipefail

# A signal to the step reaches every process of it: this shell and the agent ignore USR1 (a time limit) and TERM
# (preemption), the ranks save on either, once.
trap '' USR1 TERM

# NeMo-Run starts steps in a folder of its own.
cd "${ICRL_HOME:-.}"
# In a container whose image has PYTORCH_VERSION, pyxis takes each task for a rank.
unset RANK LOCAL_RANK WORLD_SIZE
# The checkout's packages, not those that an image was built with.
export PYTHONPATH=$PWD:$PWD/kernels:$PWD/recipes${PYTHONPATH:+:$PYTHONPATH}
python=${ICRL_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
ranks=${ICRL_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-$( (nvidia-smi -L 2> /dev/null || true) | wc -l)}}
if [ "$ranks" -lt 1 ]; then
  echo "error: no GPU on $(hostname), and ICRL_RANKS_PER_NODE is not set: how many ranks?" >&2
  exit 2
fi
nodes=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}
if [ "$nodes" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
  # The first of e.g. rack[2-3]n[01,07-09],login; no image has scontrol.
  MASTER_ADDR=$(sed -E 's/\[([^],-]*)[^]]*\]/\1/g; s/,.*//' <<< "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}")
fi
# One node meets on loopback, at a port that the agent chooses; several at a port of the job's own, so that two jobs on
# one node do not meet (docs/SECURITY.md lists the ports).
meet=()
if [ "$nodes" -gt 1 ]; then
  meet=("--master-addr=$MASTER_ADDR" "--master-port=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-$$} % 20000))}")
fi

# A rank whose peer died must end, not wait for it until the job's time is up.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
# Warnings only; a hang is searched for with NCCL_DEBUG=INFO from outside.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# NVLink SHARP reserves memory for every communicator, which the engine's cache needs more.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
# NCCL's own virtual-memory allocations cannot be shared with an engine by CUDA IPC.
export NCCL_CUMEM_ENABLE=${NCCL_CUMEM_ENABLE:-0}
# Kernels start in the order in which they were issued: Megatron overlaps tensor-parallel collectives that way.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Expandable segments cannot be paused, and a sleeping engine is paused memory.
unset PYTORCH_CUDA_ALLOC_CONF
# As many threads as cores of each rank.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc) + ranks - 1) / ranks ))}
# Forked tokenizer threads deadlock.
export TOKENIZERS_PARALLELISM=false

# Ranks leave here how they ended: the agent turns every code into 1. job.sh names a file of its own.
logs=${ICRL_LOGS:-runs/jobs}
mkdir -p "$logs"
outcome=${ICRL_OUTCOME:-$logs/outcome.${SLURM_JOB_ID:-$$}.${SLURM_RESTART_COUNT:-0}.json}

# Left by a job of another cluster, or of another year, that had this number.
if [ -z "${ICRL_OUTCOME:-}" ] && [ -n "${SLURM_JOB_ID:-}" ] && [ "${SLURM_NODEID:-0}" -eq 0 ]; then
  [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || rm -f "$logs/job.$SLURM_JOB_ID.json" "$logs/given_up.$SLURM_JOB_ID"
  rm -f "$outcome"
fi

give_up() {  # no more requeues, regardless of what the caller of this step does
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    if command -v scontrol > /dev/null; then timeout 30 scontrol update JobId="$SLURM_JOB_ID" Requeue=0 || true; fi
    touch "$logs/given_up.$SLURM_JOB_ID"  # for the script around a container, where there is no scontrol
  fi
  exit "$1"
}
# Under NeMo-Run no script decides between the runs of a job: a requeued run first checks how the one before ended.
if [ -z "${ICRL_OUTCOME:-}" ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "${SLURM_NODEID:-0}" -eq 0 ]; then
  before=$logs/outcome.$SLURM_JOB_ID.$((SLURM_RESTART_COUNT - 1)).json
  decision=$("$python" -m icrl_megatron.launch.job decide "$before" "$logs/job.$SLURM_JOB_ID.json" 1 0 "$@") || decision=fail
  case $decision in
    retry*) sleep "${decision#retry }" ;;
    fail) give_up 1 ;;
  esac
fi

# Where no job has started the environment servers that the recipe asks for, the first node does, beside its ranks.
servers=''
if [ -z "${ICRL_SERVERS:-}" ]; then
  export ICRL_SERVERS=$logs/servers.${SLURM_JOB_ID:-$$}.${SLURM_RESTART_COUNT:-0}
  if [ "${SLURM_NODEID:-0}" -eq 0 ]; then
    rm -f "$ICRL_SERVERS/addresses.json"  # of servers that ended; their logs stay
    ICRL_PARENT=$$ "$python" -m icrl_megatron.launch.servers "$ICRL_SERVERS" "$@" &
    servers=$!
  fi
fi

code=0
ICRL_OUTCOME=$outcome "$python" -m icrl_megatron.launch.agent \
  --nnodes="$nodes" --node-rank="${SLURM_NODEID:-0}" --nproc-per-node="$ranks" "${meet[@]}" \
  -m icrl_megatron.launch.rank "$@" || code=$?
[ -z "$servers" ] || { kill "$servers" 2> /dev/null; wait "$servers"; } || true

if [ -z "${ICRL_OUTCOME:-}" ] && [ -f "$outcome" ]; then  # no caller reads it
  case $(cat "$outcome") in
    *'"code": 1'* | *'"code": 2'*)
      [ "${SLURM_NODEID:-0}" -ne 0 ] || "$python" -m icrl_megatron.launch.job said "$outcome"
      case $(cat "$outcome") in *'"code": 2'*) give_up 2 ;; *) give_up 1 ;; esac ;;
    *'"code": 3'*) code=${ICRL_EXIT_STOPPED:-0} ;;  # stopped on request: the caller decides about a requeue
  esac
fi
exit "$code"
