#!/usr/bin/env bash
# Trains the three stages one after the other on the GPUs of this machine.
#
#   examples/mistral_7b/train_single_node.sh [extra options for pretrain_vlm.py]
#
# GPUS_PER_NODE  processes to start (8)
# STAGES         stages to run, in order ("stage1 stage2 stage3")
# WORK_DIR       folder that holds data/ and checkpoints/ (the repository)
# LOG_DIR        one log per rank is written below it (WORK_DIR/logs/<recipe>)
# RECIPE         folder with model.yaml and the stages' files (that of this script)
#
# Run it again after an interruption: finished stages end at once, the others resume.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$(cd "${RECIPE:-${here}}" && pwd)
repository=$(cd "${here}/../.." && pwd)
read -ra stages <<<"${STAGES:-stage1 stage2 stage3}"

cd "${WORK_DIR:-${repository}}"
logs=${LOG_DIR:-${PWD}/logs/$(basename "${recipe}")}
# The package runs from the checkout; an installed one is not needed.
export PYTHONPATH="${repository}${PYTHONPATH:+:${PYTHONPATH}}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# One hardware queue: kernels start in the order of their calls. Tensor parallelism relies on it to
# send gradients while weights' gradients are computed (megatron-core, tensor_parallel/layers.py).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

for stage in "${stages[@]}"; do
    echo "== ${stage}: logs of every rank below ${logs}/${stage}"
    mkdir -p "${logs}/${stage}"
    torchrun --standalone --nproc-per-node "${GPUS_PER_NODE:-8}" \
        --log-dir "${logs}/${stage}" --tee 3 --local-ranks-filter 0 --shutdown-timeout 270 \
        "${repository}/pretrain_vlm.py" \
        --config "${recipe}/model.yaml" --config "${recipe}/${stage}.yaml" "$@"
done
