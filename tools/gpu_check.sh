#!/usr/bin/env bash
# Every check and benchmark that needs a GPU, on a machine with one NVIDIA GPU and a Python with torch and triton:
#   bash tools/gpu_check.sh [--quick] [--out benchmarks/<gpu>-<date>] [stage ...]
# No network is used. Stages take under 10 minutes each; one that is done is not done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && .venv/bin/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2> /dev/null && PYTHON=.venv/bin/python
fi
exec "$PYTHON" tools/gpu_check.py "$@"
