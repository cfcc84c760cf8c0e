#!/usr/bin/env bash
# Submits the three stages as Slurm jobs, each waiting for the one before to succeed.
#
#   examples/slurm/submit_stages.sh [options for sbatch] [-- options for pretrain_vlm.py]
#   examples/slurm/submit_stages.sh --nodes 4 --partition gpu -- --training.seed 7
#
# STAGES   stages to submit, in order ("stage1 stage2 stage3")
# The variables of train.sbatch (RECIPE, WORK_DIR, GPUS_PER_NODE, ...) are passed on.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export REPOSITORY=${REPOSITORY:-$(cd "${here}/../.." && pwd)}
read -ra stages <<<"${STAGES:-stage1 stage2 stage3}"

sbatch_options=()
while (($# > 0)) && [[ $1 != -- ]]; do
    sbatch_options+=("$1")
    shift
done
[[ ${1:-} != -- ]] || shift

after=()
for stage in "${stages[@]}"; do
    # --parsable prints "job" or "job;cluster".
    answer=$(STAGE=${stage} sbatch --parsable --job-name "dattn-${stage}" --export=ALL \
        "${after[@]}" "${sbatch_options[@]}" "${here}/train.sbatch" "$@")
    job=${answer%%;*}
    echo "${stage}: job ${job}"
    # A stage whose predecessor failed would otherwise wait in the queue for ever.
    after=(--dependency="afterok:${job}" --kill-on-invalid-dep=yes)
done
