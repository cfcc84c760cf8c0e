"""What is not imported until a run on a CPU could train, and what is there all the same later."""

import subprocess
import sys

import pytest
import torch

START = """
from megatron_dattn.runtime.log import silence_import_warnings
silence_import_warnings()  # as every program does before it imports megatron-core
import sys, torch
compiler = torch.compile
from megatron_dattn.training import pretrain
from megatron_dattn.runtime.distributed import one_process
with one_process():
    needless = {"torch._dynamo", "torch._inductor", "torch.utils.tensorboard"}
    print(*sorted(needless & set(sys.modules)))
assert torch.compile is compiler
import torch.utils.tensorboard
from megatron.core import jit
assert (jit.jit_fuser is compiler) == torch.cuda.is_available()
def twice(x):
    return 2 * x
if not torch.cuda.is_available():
    assert jit.jit_fuser(twice) is twice and jit.jit_fuser(dynamic=True)(twice) is twice
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU functions are compiled")
def test_neither_the_compiler_nor_tensorboard_is_imported() -> None:
    run = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""


TESTS_OWN = """
import megatron.core.jit, torch
assert megatron.core.jit.jit_fuser is torch.compile
from megatron_dattn.runtime.cpu import enable_cpu_runtime
enable_cpu_runtime()
assert megatron.core.jit.jit_fuser(lambda x: 2 * x)(torch.ones(1)) == 2
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU functions are compiled")
def test_an_engine_that_was_imported_before_compiles_nothing_either() -> None:
    run = subprocess.run([sys.executable, "-c", TESTS_OWN], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
