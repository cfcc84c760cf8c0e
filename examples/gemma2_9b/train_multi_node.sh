#!/usr/bin/env bash
# Trains the three stages of this recipe on several machines: start it on each of them.
#
# Variables and options are those of examples/mistral_7b/train_multi_node.sh, which does it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
RECIPE=${here} exec "${here}/../mistral_7b/train_multi_node.sh" "$@"
