#!/usr/bin/env bash
# Trains the three stages of this recipe on the GPU of this machine; GPUS_PER_NODE=4 takes four.
#
# Variables and options are those of examples/mistral_7b/train_single_node.sh, which does it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
GPUS_PER_NODE=${GPUS_PER_NODE:-1} RECIPE=${here} exec "${here}/../mistral_7b/train_single_node.sh" "$@"
