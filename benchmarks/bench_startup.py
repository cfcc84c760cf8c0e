"""What the start of a run costs before anything is built: the comparison of the ranks, the checks.

    python -m benchmarks.bench_startup --output benchmarks/startup_cpu.md

Ranks of one machine meet over gloo and then go through `check_start` in rounds, with and without
comparing what they were started with, and with the tokenizer read anew for every part that needs
it. In every round all files are read again: the sum over the code and the tokenizer kept in memory
are forgotten before. Importing torch and megatron-core, which takes seconds, and the meeting are no
part of it. The tokenizer is a random one of --vocabulary entries, the data --records records of
text.
"""

import argparse
import json
import os
import random
import shlex
import socket
import sys
import tempfile
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks import report
from benchmarks.protocol import Spread, Step, Timings, time_on_host, time_rounds
from megatron_dattn.runtime.log import setup_logging, silence_import_warnings

silence_import_warnings()  # before megatron-core is imported

from megatron_dattn.config.pretrain import PretrainConfig  # noqa: E402
from megatron_dattn.config.training import TrainingConfig  # noqa: E402
from megatron_dattn.data import tokenizer as tokenizers_module  # noqa: E402
from megatron_dattn.data.config import DataConfig, DatasetConfig  # noqa: E402
from megatron_dattn.data.prepare import write_jsonl  # noqa: E402
from megatron_dattn.models.config import LanguageConfig, ModelConfig  # noqa: E402
from megatron_dattn.runtime.distributed import destroy_distributed, join_world  # noqa: E402
from megatron_dattn.runtime.same_facts import all_ranks_have_same  # noqa: E402
from megatron_dattn.runtime.tool import ToolParser  # noqa: E402
from megatron_dattn.training.checks import check_start  # noqa: E402
from megatron_dattn.training.start_facts import code_sha256, start_facts  # noqa: E402

_READ_TOKENIZER = tokenizers_module._read_tokenizer
_WARM_UP = 1
_WITHOUT, _WITH = "checks alone", "comparison and checks"
_COMPARISON, _EXCHANGE = "comparison alone", "its exchange alone"
_ANEW = "comparison and checks, tokenizer read for each part"
VARIANTS = (_WITHOUT, _WITH, _COMPARISON, _EXCHANGE, _ANEW)


def startup_report(arguments: argparse.Namespace) -> str:
    """Measure everything; the whole Markdown file."""
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        make_workspace(Path(folder), arguments.vocabulary, arguments.records)
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            port = listener.getsockname()[1]
        processes.spawn(
            _measure, (arguments, folder, port), nprocs=arguments.ranks, start_method="spawn"
        )
        measured = json.loads((Path(folder) / "timings.json").read_text())
        timings = Timings(**measured)
        size = (Path(folder) / "tokenizer" / "tokenizer.json").stat().st_size
    growth = [
        1000 * (with_ - without)
        for with_, without in zip(timings.seconds[_WITH], timings.seconds[_WITHOUT], strict=True)
    ]
    notes = [
        report.rounds_note(timings.num_rounds, arguments.rounds, _WARM_UP).replace(
            "one process", f"{arguments.ranks} processes over gloo"
        ),
        f"tokenizer of {arguments.vocabulary} entries ({size / 1e6:.1f} MB), training and "
        f"validation data of {arguments.records} records each",
        f"noise floor: {report.spread(timings.noise)}",
    ]
    head = report.header("The start of a run", arguments.command, torch.device("cpu"), notes)
    rows = [[name, report.spread(timings.milliseconds(name), 1)] for name in timings.seconds]
    rows.append(["growth by the comparison, within a round", report.spread(Spread.of(growth), 1)])
    return f"{head}\n\n{report.table(['what', 'ms'], rows)}\n\n{_scale()}"


def _scale() -> str:
    """The exchange by the number of ranks: its payload does not grow, its steps do."""
    return (
        "The exchange is one all-reduce of 64 integers of 32 bits (256 bytes), whatever the number "
        "of settings. Everything else of the comparison is done by each rank for itself, so 1024 "
        "ranks pay for it what two do; only the all-reduce takes 2 * log2(1024) = 20 messages one "
        "after the other where two ranks take 2. At 50 microseconds a message between hosts this "
        "is 1 ms (an estimate, not a measurement); NCCL's first all-reduce, which sets up its "
        "connections, comes at the start of every run anyway. What the ranks differ in is gathered "
        "only where they do. From a shared file system each rank reads the code of this package "
        "(which its import reads as well), the tokenizer, and 64 kB and the index of each data set."
    )


def make_workspace(folder: Path, vocabulary: int, records: int) -> None:
    """A tokenizer, data and an image processor below a folder."""
    make_tokenizer(vocabulary).save_pretrained(folder / "tokenizer")
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 384, "width": 384},
        "resample": 3,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
    }
    (folder / "tokenizer" / "preprocessor_config.json").write_text(json.dumps(processor))
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A square."}]
    for name in ("train", "validation"):
        records_of_text = ({"id": str(number), "conversations": turns} for number in range(records))
        write_jsonl(records_of_text, folder / f"{name}.jsonl")


def make_tokenizer(vocabulary: int, seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte pairs merged at random: as large as a real one, and as slow to read."""
    rng = random.Random(seed)
    entries = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    names, merges = list(entries), []
    while len(names) < vocabulary:
        pair = rng.choice(names), rng.choice(names)
        merged = "".join(pair)
        if len(merged) <= 12 and merged not in entries:
            entries[merged] = None
            names.append(merged)
            merges.append(pair)
    ids = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ("<s>", "</s>", "<pad>", "<image>")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def configuration(folder: Path, vocabulary: int) -> PretrainConfig:
    """A run that has validation data and a place to save."""
    return PretrainConfig(
        model=ModelConfig(language=LanguageConfig(vocab_size=vocabulary + 64)),
        data=DataConfig(
            train=[DatasetConfig(path=str(folder / "train.jsonl"))],
            validation=[DatasetConfig(path=str(folder / "validation.jsonl"))],
            tokenizer=str(folder / "tokenizer"),
            template="plain",
            num_workers=0,
        ),
        training=TrainingConfig(global_batch_size=64, eval_interval=10),
    )


def variants(config: PretrainConfig) -> dict[str, Step]:
    """The work that is timed; every one is collective."""
    facts = start_facts(config)

    def start(*, compared: bool) -> None:
        _forget()
        if compared:
            all_ranks_have_same(start_facts(config))
        check_start(config)

    def compare() -> None:
        _forget()
        all_ranks_have_same(start_facts(config))

    def start_without_memory() -> None:
        anew = _READ_TOKENIZER.__wrapped__
        with mock.patch.object(tokenizers_module, "_read_tokenizer", anew):
            start(compared=True)

    return {
        _WITHOUT: lambda: start(compared=False),
        _WITH: lambda: start(compared=True),
        _COMPARISON: compare,
        _EXCHANGE: lambda: all_ranks_have_same(facts),
        _ANEW: start_without_memory,
    }


def _forget() -> None:
    """What a process remembers of files that it has read."""
    code_sha256.cache_clear()
    _READ_TOKENIZER.cache_clear()


def _time_together(step: Step) -> float:
    """Seconds until the last rank is done."""

    def step_of_all() -> None:
        step()
        dist.barrier()

    dist.barrier()
    return time_on_host(step_of_all)


def _measure(rank: int, arguments: argparse.Namespace, folder: str, port: int) -> None:
    """One rank; the first one writes the timings down."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": arguments.ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    setup_logging(rank, level="ERROR", stream=sys.stderr)
    torch.set_num_threads(arguments.threads)
    join_world()
    timings = time_rounds(
        variants(configuration(Path(folder), arguments.vocabulary)),
        rounds=arguments.rounds,
        timer=_time_together,
        warm_up=_WARM_UP,
    )
    if rank == 0:
        (Path(folder) / "timings.json").write_text(json.dumps(asdict(timings)))
    destroy_distributed()


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `command` is what to type to repeat it."""
    parser = ToolParser(__doc__, prog="python -m benchmarks.bench_startup")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="Markdown file; printed in any case")
    parsed = parser.parse_args(arguments)
    parsed.command = f"{parser.prog} {shlex.join(arguments)}"
    return parsed


def main(arguments: list[str] | None = None) -> int:
    return report.run(startup_report, parse(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
