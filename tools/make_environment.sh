#!/usr/bin/env bash
# Makes a virtual environment with the locked versions of everything and this package, or brings one
# up to date; one that is complete is left alone.
#
#   tools/make_environment.sh FOLDER [LOCK]
#
# LOCK         file of the locked versions (requirements.lock)
# PYTHON       interpreter to make it with: by default an existing environment's own, or else the
#              first that tools/find_python.sh finds
# ADMITTED     as for tools/find_python.sh, where the lock needs a newer one
# TORCH_ARGS   more words for pip when it installs torch, such as an index with builds for machines
#              without GPU
set -euo pipefail

folder=${1:?give the folder of the environment}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
lock=${root}/${2:-requirements.lock}
read -ra torch_args <<<"${TORCH_ARGS:-}"

present=$(PYTHON=${folder}/bin/python "${root}/tools/find_python.sh" 2>/dev/null) || present=
if [[ -n ${PYTHON:-} || -z ${present} ]]; then
    found=$("${root}/tools/find_python.sh")
    if [[ ${found%% *} != "${present%% *}" ]]; then
        if [[ ! -e ${folder}/pyvenv.cfg && -n $(ls -A "${folder}" 2>/dev/null) ]]; then
            echo "error: ${folder} holds other things than an environment; name a new folder" >&2
            exit 1
        fi
        # Cleared, because packages of another interpreter would stay beside the new one's.
        "${found#* }" -m venv --clear "${folder}"
        present=${found}
    fi
fi

complete="${present%% *} $(cat "${lock}" "${root}/pyproject.toml" | cksum)"
if [[ $(cat "${folder}/.installed" 2>/dev/null) == "${complete}" ]]; then
    exit
fi
pip=("${folder}/bin/python" -m pip install --quiet --disable-pip-version-check)
# torch first: a range in another package would otherwise pull a build for another machine.
"${pip[@]}" "${torch_args[@]}" "$(grep '^torch==' "${lock}")"
"${pip[@]}" -r "${lock}"
"${pip[@]}" --no-deps -e "${root}"
echo "${complete}" >"${folder}/.installed"
