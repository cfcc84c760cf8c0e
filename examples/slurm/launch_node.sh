#!/usr/bin/env bash
# Runs once per node inside a Slurm step (see train.sbatch): starts torchrun for the node's GPUs.
#
#   launch_node.sh SCRIPT [ARGUMENTS]
#
# It replaces itself by torchrun, so that signals of the step reach torchrun and not a shell.
set -euo pipefail

node_logs=${LOG_DIR:?}/node-${SLURM_NODEID:?}
mkdir -p "${node_logs}"

exec torchrun \
    --nnodes "${SLURM_NNODES:?}" --node-rank "${SLURM_NODEID}" \
    --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:?}" \
    --rdzv-id "${SLURM_JOB_ID:?}" \
    --nproc-per-node "${GPUS_PER_NODE:?}" \
    --log-dir "${node_logs}" --tee 3 --local-ranks-filter 0 \
    --shutdown-timeout "${GRACE_SECONDS:?}" \
    "$@"
