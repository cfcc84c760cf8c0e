#!/usr/bin/env bash
# Trains the three stages on several machines: start the same command on each of them.
#
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=node-0 examples/mistral_7b/train_multi_node.sh [options]
#
# NNODES         number of machines                                     (required)
# NODE_RANK      number of this machine, 0 .. NNODES-1                  (required)
# MASTER_ADDR    name or address of machine 0, reachable from all       (required)
# MASTER_PORT    free port on machine 0 (29500)
# RENDEZVOUS_SECONDS   how long machines wait for each other at the start (600)
# GPUS_PER_NODE, STAGES, WORK_DIR, LOG_DIR, RECIPE   as in train_single_node.sh
#
# WORK_DIR must be a folder that all machines share: checkpoints are written by every rank.
# Under Slurm use examples/slurm instead.
set -euo pipefail

: "${NNODES:?set NNODES to the number of machines}"
: "${NODE_RANK:?set NODE_RANK to the number of this machine, counted from 0}"
: "${MASTER_ADDR:?set MASTER_ADDR to the name or address of machine 0}"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$(cd "${RECIPE:-${here}}" && pwd)
repository=$(cd "${here}/../.." && pwd)
read -ra stages <<<"${STAGES:-stage1 stage2 stage3}"

cd "${WORK_DIR:-${repository}}"
logs=${LOG_DIR:-${PWD}/logs/$(basename "${recipe}")}
export PYTHONPATH="${repository}${PYTHONPATH:+:${PYTHONPATH}}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# One hardware queue: kernels start in the order of their calls. Tensor parallelism relies on it to
# send gradients while weights' gradients are computed (megatron-core, tensor_parallel/layers.py).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

for stage in "${stages[@]}"; do
    node_logs=${logs}/${stage}/node-${NODE_RANK}
    echo "== ${stage}: logs of every rank of this machine below ${node_logs}"
    mkdir -p "${node_logs}"
    echo "== machine ${NODE_RANK} of ${NNODES}: meeting the others at" \
        "${MASTER_ADDR}:${MASTER_PORT:-29500}, for up to ${RENDEZVOUS_SECONDS:-600} s"
    torchrun --nnodes "${NNODES}" --node-rank "${NODE_RANK}" \
        --master-addr "${MASTER_ADDR}" --master-port "${MASTER_PORT:-29500}" \
        --rdzv-conf "timeout=${RENDEZVOUS_SECONDS:-600}" \
        --nproc-per-node "${GPUS_PER_NODE:-8}" \
        --log-dir "${node_logs}" --tee 3 --local-ranks-filter 0 --shutdown-timeout 270 \
        "${repository}/pretrain_vlm.py" \
        --config "${recipe}/model.yaml" --config "${recipe}/${stage}.yaml" "$@"
done
