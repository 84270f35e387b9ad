#!/usr/bin/env bash
# One node's part of a job, with the only line that starts ranks. srun and NeMo-Run run it once per node; it also runs alone.
#   slurm/step.sh train RECIPE [KEY=VALUE]...
# ICRL_PYTHON            the Python to use (default: .venv/bin/python if it exists, else python3)
# ICRL_RANKS_PER_NODE    ranks on this node (default: the number of its GPUs)
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

# Ranks write their outcome here, because the agent maps all failure codes to 1. job.sh sets its own file.
logs=${ICRL_LOGS:-runs/jobs}
mkdir -p "$logs"
outcome=${ICRL_OUTCOME:-$logs/outcome.${job:-$$}.$restart.json}

# Left by an earlier job, or a job of another cluster, with the same number.
if [ -z "${ICRL_OUTCOME:-}" ] && [ -n "$job" ] && [ "$node" -eq 0 ]; then
  [ "$restart" -gt 0 ] || rm -f "$logs/job.$job.json" "$logs/given_up.$job"
  rm -f "$outcome"
fi

give_up() {  # prevents further requeues, whatever the caller of this step does
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    if command -v scontrol > /dev/null; then timeout 30 scontrol update JobId="$SLURM_JOB_ID" Requeue=0 || true; fi
    touch "$logs/given_up.$SLURM_JOB_ID"  # for the script outside a container, which has no scontrol
  fi
  exit "$1"
}
# Under NeMo-Run and Kubernetes no script decides between the runs of a job: a requeued run first checks how the previous one ended.
if [ -z "${ICRL_OUTCOME:-}" ] && [ "$restart" -gt 0 ] && [ "$node" -eq 0 ]; then
  before=$logs/outcome.$job.$((restart - 1)).json
  decision=$("$python" -m icrl_megatron.launch.job decide "$before" "$logs/job.$job.json" 1 0 "$@") || decision=fail
  case $decision in
    retry*) sleep "${decision#retry }" ;;
    fail) give_up 1 ;;
  esac
fi

# If the job has not started the recipe's environment servers, the first node starts them beside its ranks.
servers=''
if [ -z "${ICRL_SERVERS:-}" ]; then
  export ICRL_SERVERS=$logs/servers.${job:-$$}.$restart
  if [ "$node" -eq 0 ]; then
    rm -f "$ICRL_SERVERS/addresses.json"  # of earlier servers; their logs are kept
    ICRL_PARENT=$$ "$python" -m icrl_megatron.launch.servers "$ICRL_SERVERS" "$@" &
    servers=$!
  fi
fi

code=0
ICRL_OUTCOME=$outcome "$python" -m icrl_megatron.launch.agent \
  --nnodes="$nodes" --node-rank="$node" --nproc-per-node="$ranks" "${meet[@]}" \
  -m icrl_megatron.launch.rank "$@" || code=$?
[ -z "$servers" ] || { kill "$servers" 2> /dev/null; wait "$servers"; } || true

if [ -z "${ICRL_OUTCOME:-}" ] && [ -f "$outcome" ]; then  # no caller reads it
  case $(cat "$outcome") in
    *'"code": 1'* | *'"code": 2'*)
      [ "$node" -ne 0 ] || "$python" -m icrl_megatron.launch.job said "$outcome"
      case $(cat "$outcome") in *'"code": 2'*) give_up 2 ;; *) give_up 1 ;; esac ;;
    *'"code": 3'*) code=${ICRL_EXIT_STOPPED:-0} ;;  # stopped on request: the caller decides about a requeue
  esac
fi
exit "$code"
