#!/usr/bin/env bash
# Trains the three stages of this recipe on the GPUs of this machine.
#
# Variables and options are those of examples/mistral_7b/train_single_node.sh, which does it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
RECIPE=${here} exec "${here}/../mistral_7b/train_single_node.sh" "$@"
