#!/usr/bin/env bash
# Makes FOLDER, with verifiers 0.3 and OpenEnv, and FOLDER/v1, with verifiers 0.4: install.sh PYTHON FOLDER [PIP_ARGS...]
# What is the same or newer in the environment of PYTHON is taken from there, by path files, and FOLDER/v1 also takes the
# packages of FOLDER.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")" python="$1" folder="$2"
shift 2

packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

make() { # folder requirements packages...
    "${python}" -m venv --clear --without-pip "$1"
    printf '%s\n' "${@:3}" > "$(packages "$1/bin/python")/others.pth"
    "${python}" -m pip --python "$1/bin/python" install -q --disable-pip-version-check "${pip_args[@]}" --no-deps \
        -r "${here}/$2"
}

pip_args=("$@")
make "${folder}" requirements.txt "$(packages "${python}")"
make "${folder}/v1" requirements-v1.txt "$(packages "${folder}/bin/python")" "$(packages "${python}")"
