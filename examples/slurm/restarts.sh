#!/usr/bin/env bash
# Whether a stage that crashed is started again: sourced by train.sbatch, does nothing by itself.
#
# A crash (a killed process, a lost node, ranks that do not meet) is worth another try from the newest
# checkpoint as long as tries get somewhere: never twice from the same checkpoint, and not more often
# than MAX_CRASHES. What each crash left behind stands in CRASHES, one line per crash with the newest
# step; RUNNING is there while training runs, so that a job whose own host was lost counts as crashed.

set -euo pipefail

# The newest checkpoint's step, or "none".
newest_step() {
    local newest=none folder step
    for folder in "${SAVE_DIR}"/step-*; do
        step=${folder##*/step-}
        [[ -d ${folder} && ${step} =~ ^[0-9]{7,}$ ]] || continue
        step=$((10#${step}))
        [[ ${newest} != none ]] && ((step <= newest)) || newest=${step}
    done
    echo "${newest}"
}

# Notes a crash; fails, with the reason, if there should be no further try.
may_restart_after_crash() {
    local step
    step=$(newest_step)
    if grep -qsx "${step}" "${CRASHES}"; then
        echo "crashed again before a checkpoint after step ${step}: giving up" >&2
        return 1
    fi
    echo "${step}" >>"${CRASHES}"
    if (($(wc -l <"${CRASHES}") > MAX_CRASHES)); then
        echo "crashed ${MAX_CRASHES} times before: giving up" >&2
        return 1
    fi
    echo "crashed; the next attempt starts from step ${step}"
}

# Whether a rank ended with an exit code that another try would meet again: 2, a mistake, or 17, bad
# numbers. A run that was refused its save folder writes nothing there, and torchrun ends with 1
# whatever the ranks ended with; what they told torchrun lies among this attempt's logs.
is_mistake() { # STATUS
    (($1 == 2 || $1 == 17)) ||
        grep -rqsE --include=error.json '"errorCode": (2|17)\b' "${LOG_DIR}"
}
