#!/usr/bin/env bash
# Runs the tests of saving, loading and resuming under every interpreter that pyproject.toml admits
# and this machine has, each in an environment of its own.
#
#   tools/test_pythons.sh [pytest options]
#
# PYTHON         one interpreter instead of all
# ENVIRONMENTS   folder of the environments, made once and kept (.venv-pythons)
# TORCH_ARGS     as for tools/make_environment.sh
#
# What a checkpoint holds is pickled, and what a pickle names differs between interpreters.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tests=(
    tests/unit/checkpoint
    tests/unit/training/test_checkpoint.py
    tests/unit/runtime/test_random_states.py
    tests/unit/data/test_loader.py
    tests/unit/data/test_loader_state.py
    tests/unit/inference/test_load.py
    tests/distributed/test_checkpoint.py
    tests/distributed/test_stored_tensors.py
    tests/functional/test_resume.py
)
environments=${ENVIRONMENTS:-.venv-pythons}
interpreters=$(tools/find_python.sh --all)
results=()
failed=0
while read -r version python; do
    environment=${environments}/${version}
    echo "== Python ${version}: ${python}"
    PYTHON=${python} tools/make_environment.sh "${environment}"
    if "${environment}/bin/python" -m pytest -n 4 --dist worksteal -m "not slow and not gpu" \
        "${tests[@]}" "$@" </dev/null; then
        results+=("${version}: passed")
    else
        results+=("${version}: FAILED")
        failed=1
    fi
done <<<"${interpreters}"
echo "== saving, loading and resuming under Python"
printf '%s\n' "${results[@]}"
exit "${failed}"
