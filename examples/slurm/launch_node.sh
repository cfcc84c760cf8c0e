#!/usr/bin/env bash
# Runs once per node inside a Slurm step (see train.sbatch): starts torchrun for the node's GPUs.
#
#   launch_node.sh SCRIPT [ARGUMENTS]
#
# It replaces itself by torchrun, so that signals of the step reach torchrun and not a shell.
#
# A SIGTERM of the step reaches the ranks as well, which then save and end with 0. torchrun need not
# hand it on, and hearing it would end with a traceback and 1: it is started ignoring SIGTERM, and told
# to leave it at that. It never starts ranks again by itself (--max-restarts): it would do so for a
# mistake in the configuration, too. restarts.sh decides for the whole job.
set -euo pipefail
trap '' TERM

node_logs=${LOG_DIR:?}/node-${SLURM_NODEID:?}
mkdir -p "${node_logs}"

echo "node ${SLURM_NODEID} ($(hostname)): meeting ${SLURM_NNODES:?} nodes at" \
    "${MASTER_ADDR:?}:${MASTER_PORT:?}, for up to ${RENDEZVOUS_SECONDS:-600} s"

exec torchrun \
    --nnodes "${SLURM_NNODES:?}" --node-rank "${SLURM_NODEID}" \
    --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:?}" \
    --rdzv-id "${SLURM_JOB_ID:?}" --rdzv-conf "timeout=${RENDEZVOUS_SECONDS:-600}" \
    --nproc-per-node "${GPUS_PER_NODE:?}" \
    --log-dir "${node_logs}" --tee 3 --local-ranks-filter 0 \
    --shutdown-timeout "${GRACE_SECONDS:?}" --signals-to-handle SIGINT,SIGHUP,SIGQUIT \
    --max-restarts 0 \
    "$@"
