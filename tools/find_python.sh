#!/usr/bin/env bash
# Prints the interpreter that environments are made with, or every suitable one.
#
#   tools/find_python.sh         the first that is suitable, as "VERSION PATH"; its choice on stderr
#   tools/find_python.sh --all   one line per version that is found
#
# PYTHON       takes this interpreter and no other
# ADMITTED     the versions that are suitable, in place of pyproject.toml's requires-python
# PYENV_ROOT   where pyenv keeps its interpreters (~/.pyenv)
#
# Each candidate is really started: a name on PATH may be a pyenv shim without a version behind it, a
# Python that pyproject.toml does not admit, or one whose distribution keeps venv in another package.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
admitted=${ADMITTED:-$(sed -n 's/^requires-python *= *"\(.*\)"/\1/p' "${root}/pyproject.toml")}
if [[ ! ${admitted} =~ ^">=3."([0-9]+)",<3."([0-9]+)$ ]]; then
    echo "error: requires-python (or ADMITTED) is '${admitted}', not '>=3.A,<3.B'" >&2
    exit 1
fi
oldest=${BASH_REMATCH[1]} beyond=${BASH_REMATCH[2]}

# Written for any Python, 2.7 too. Its last line is "VERSION PATH", or what is amiss.
probe="
import sys
version = '%d.%d.%d' % sys.version_info[:3]
if not (3, ${oldest}) <= sys.version_info[:2] < (3, ${beyond}):
    sys.exit('is Python ' + version)
import platform, sysconfig
if platform.python_implementation() != 'CPython' or sysconfig.get_config_var('Py_GIL_DISABLED'):
    sys.exit('is no ordinary CPython, for which packages are built')
absent = []
for module in ('venv', 'ensurepip', 'ssl', 'ctypes'):
    try:
        __import__(module)
    except ImportError:
        absent.append(module)
if absent:
    sys.exit('is Python %s without %s' % (version, ', '.join(absent)))
print(version + ' ' + sys.executable)
"

candidates() {
    if [[ -n ${PYTHON:-} ]]; then
        type -P "${PYTHON}" || echo "${PYTHON}"
        return
    fi
    local minor names=()
    for ((minor = oldest; minor < beyond; minor++)); do
        names+=("python3.${minor}")
    done
    type -aP "${names[@]}" python3 python || true
    for ((minor = oldest; minor < beyond; minor++)); do
        compgen -G "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/3.${minor}.*/bin/python3" || true
    done
}

found=() rejected=() seen=" "
while read -r candidate; do
    if answer=$("${candidate}" -c "${probe}" 2>&1 </dev/null); then
        answer=${answer##*$'\n'}
        version=${answer%% *}
        [[ ${seen} == *" ${version} "* ]] && continue
        seen+="${version} "
        found+=("${answer}")
        [[ ${1:-} == --all ]] || break
    else
        answer=$(head -n 1 <<<"${answer}" | cut -c 1-120)
        rejected+=("  ${candidate}: ${answer:-does not run}")
    fi
done < <(candidates)

if ((${#found[@]} == 0)); then
    {
        if [[ -n ${PYTHON:-} ]]; then
            echo "error: PYTHON=${PYTHON} cannot be used; wanted is a Python ${admitted} with venv:"
        else
            echo "error: no Python ${admitted} with venv was found. Looked at:"
        fi
        printf '%s\n' "${rejected[@]:-  nothing: there is no python on PATH}"
        echo "Install one (Debian 12 and Ubuntu 24.04: apt install python3 python3-venv; elsewhere:"
        echo "pyenv install 3.12), or name one: make PYTHON=/path/to/python3.12"
    } >&2
    exit 1
fi
printf '%s\n' "${found[@]}"
if [[ ${1:-} != --all ]]; then
    echo "Python ${found[0]%% *} of ${found[0]#* } is taken (another one: make PYTHON=PATH)" >&2
fi
