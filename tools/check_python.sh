#!/usr/bin/env bash
# Checks on another Python what needs no torch, so that no second torch (5 GB with CUDA) is installed:
# check_python.sh VERSION UV [PIP_ARGS...]. Where that version is not installed, it says so and ends with 0.
# The lock's packages for that version are installed without the large ones; every file is compiled, and a warning about its
# syntax is an error; the settings must be those of docs/SETTINGS.md; and tests of pure Python run.
set -euo pipefail
version="$1" uv="$2"
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
LARGE=(torch megatron-core transformers tokenizers safetensors tensorboard matplotlib scipy pyarrow math-verify bm25s)
TESTS=(tests/cpu/test_{agents,calculator,engine_environment,find_python,grammar,segments}.py)

# A shim of a version manager may be on the PATH without a Python behind it.
for python in "python${version}" "${PYENV_ROOT:-${HOME}/.pyenv}/versions/${version}".*/bin/python3 ""; do
    [ -z "${python}" ] || ! "${python}" -c 'import ensurepip, venv' 2> /dev/null || break
done
if [ -z "${python}" ]; then
    echo "skipped: the checks on Python ${version}, which is not installed here"
    exit
fi
folder=".venv-check-${version}"
"${python}" -m venv --clear "${folder}"
locked=("${uv}" export -q --frozen --no-hashes --no-annotate --no-emit-project --no-default-groups --group cpu)
"${locked[@]}" "${LARGE[@]/#/--prune=}" -o "${folder}/requirements.txt"
"${locked[@]}" --extra dev -o "${folder}/constraints.txt"
"${folder}/bin/python" -m pip install -q --disable-pip-version-check --no-compile "$@" -c "${folder}/constraints.txt" \
    -r "${folder}/requirements.txt" pytest pytest-timeout hypothesis
export PYTHONPATH=.:kernels:recipes PYTHONPYCACHEPREFIX="${PWD}/${folder}/pycache"
"${folder}/bin/python" -W error -m compileall -q icrl_megatron kernels recipes tests tools
"${folder}/bin/python" -m icrl_megatron.cli --version
"${folder}/bin/python" -m icrl_megatron.cli settings --markdown | diff - docs/SETTINGS.md
"${folder}/bin/python" -m pytest -q -p no:cacheprovider "${TESTS[@]}"
