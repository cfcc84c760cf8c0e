"""Imported once by the test fork server, so that its ranks start with everything heavy in memory.

Nothing here may start a thread: the ranks are forked from this process.
"""

from megatron_dattn.runtime.cpu import enable_cpu_runtime
from megatron_dattn.runtime.log import quiet_libraries

quiet_libraries()
enable_cpu_runtime()

import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.models.gpt  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import megatron.core.pipeline_parallel  # noqa: E402, F401

import megatron_dattn.config.cli  # noqa: E402
import megatron_dattn.training.pretrain  # noqa: E402, F401  (the loader, transformers: a second)
