"""What the loader costs and gives: CPU time against plain PyTorch, fill, balance, memory, growth.

    python -m benchmarks.bench_loader --output benchmarks/loader_cpu.md

Conversations with a JPEG of 384 x 384 pixels each go through our loader with all its checks, and
through torch.utils.data with PIL, Hugging Face's image processor and its chat template, in turn, in
one process with one thread. Fill and balance are those of packs of drawn lengths
(sample_lengths.py). Start-up and resume are measured on generated records of text.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import report
from benchmarks.protocol import Spread
from benchmarks.sample_lengths import (
    SampleLengths,
    first_fit_packs_of,
    mixed_lengths,
    packs_of,
    token_fill,
)
from megatron_dattn.runtime.log import silence_import_warnings

silence_import_warnings()  # before megatron-core is imported

import torch  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from transformers import SiglipImageProcessorPil  # noqa: E402

from benchmarks.kill_and_resume import (  # noqa: E402
    PREPROCESSOR,
    make_project,
    run_to_the_end,
    scalars,
)
from examples.quickstart.make_tokenizer import make_tokenizer  # noqa: E402
from megatron_dattn.data.config import DataConfig, DatasetConfig  # noqa: E402
from megatron_dattn.data.encoder import ModelSizes  # noqa: E402
from megatron_dattn.data.loader import VLMLoader, build_loader  # noqa: E402
from megatron_dattn.data.prepare import write_jsonl  # noqa: E402
from megatron_dattn.runtime.tool import ToolParser  # noqa: E402

SIDE, PATCH = 384, 14
TOKENS_PER_IMAGE = (SIDE // PATCH) ** 2
SAMPLES = 8  # of a pack, all of them with an image
TEMPLATE = Path(__file__).parents[1] / "megatron_dattn/data/templates/mistral_v3.jinja"
Table = list[list[str]]
_OURS, _PLAIN = "our loader", "torch.utils.data, PIL, transformers"


class PlainDataset(Dataset[dict[str, Any]]):
    """Reads and encodes as one writes it by hand: json, PIL, image processor, chat template."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.lines = (folder / "train.jsonl").read_text().splitlines()
        self.processor = SiglipImageProcessorPil.from_pretrained(folder)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = json.loads(self.lines[index])
        with Image.open(self.folder / record["image"]) as file:
            pixels = self.processor(file.convert("RGB"), return_tensors="pt")["pixel_values"]
        roles = {"human": "user", "gpt": "assistant"}
        turns = [
            {"role": roles[turn["from"]], "content": turn["value"]}
            for turn in record["conversations"]
        ]
        encoded = self.tokenizer.apply_chat_template(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor(encoded["input_ids"])
        labels = ids.where(torch.tensor(encoded["assistant_masks"]) == 1, -100)
        return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Make a padded batch: int64 [samples, tokens], pixels float32 [samples, 3, side, side]."""
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([sample["input_ids"] for sample in samples], batch_first=True),
        "labels": pad([s["labels"] for s in samples], batch_first=True, padding_value=-100),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
    }


def make_pictures(folder: Path, count: int) -> Any:
    """JPEGs like photographs (smooth, with grain) with conversations; returns a tokenizer."""
    random = np.random.default_rng(0)
    records = []
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = random.integers(-12, 13, smooth.shape)
        pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
        turns = []
        for turn in range(1 + number % 4):
            image = "<image>\n" if turn == 0 else ""
            turns.append({"from": "human", "value": f"{image}Which digits are in the picture?"})
            turns.append({"from": "gpt", "value": "There is a three above a seven. " * 4})
        records.append({"image": f"{number}.jpg", "conversations": turns})
    write_jsonl(records, folder / "train.jsonl")
    return make_processor(folder)


def make_processor(folder: Path) -> Any:
    """The demo's tokenizer, with the settings of an image processor beside it."""
    tokenizer = make_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE.read_text()
    tokenizer.save_pretrained(folder)
    settings = {**PREPROCESSOR, "size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return tokenizer


def our_loader(folder: Path, *, name: str = "train", num_workers: int = 0) -> VLMLoader:
    """The loader of one rank over a file of a folder."""
    config = DataConfig(
        tokenizer=str(folder),
        visual_budget=SAMPLES * TOKENS_PER_IMAGE,
        text_budget=8192,
        num_workers=num_workers,
    )
    side = SIDE // PATCH
    return build_loader(
        config,
        datasets=[DatasetConfig(str(folder / f"{name}.jsonl"))],
        sizes=ModelSizes(SIDE, (side, side), 1024),
        micro_batch_size=SAMPLES,
        data_parallel_rank=0,
        data_parallel_size=1,
        seed=0,
        training=True,
    )


def cpu_times(folder: Path, packs: int, rounds: int) -> tuple[Table, Spread]:
    """Samples per second of CPU time of both, round by round, and ours over the plain one's."""
    tokenizer = make_pictures(folder, 8 * SAMPLES)
    ours = iter(our_loader(folder))
    loader = DataLoader(
        PlainDataset(folder, tokenizer), batch_size=SAMPLES, shuffle=True, collate_fn=collate
    )
    plain = chain.from_iterable(repeat(loader))
    list(islice(ours, 12))  # its buffer is full, templates are compiled
    list(islice(plain, 2))
    speeds: dict[str, list[float]] = {_OURS: [], _PLAIN: []}
    for _ in range(rounds):
        for name, number in (
            (_OURS, lambda: sum(batch.num_samples for batch in islice(ours, packs))),
            (_PLAIN, lambda: sum(len(batch["labels"]) for batch in islice(plain, packs))),
        ):
            started = time.process_time()
            assert number() == packs * SAMPLES
            speeds[name].append(packs * SAMPLES / (time.process_time() - started))
    ratio = Spread.of([a / b for a, b in zip(*speeds.values(), strict=True)])
    rows = [[name, report.spread(Spread.of(found), 0)] for name, found in speeds.items()]
    return rows, ratio


def fill_table(look_aheads: list[int], count: int) -> Table:
    """Fill of packs of 8 images by look-ahead, by first fit and as it is now; and its CPU time."""
    rows = []
    for tokens_per_image in (729, 576):
        lengths = mixed_lengths(count, seed=0, tokens_per_image=tokens_per_image)
        budgets = lengths.budgets(images=8)
        for look_ahead in look_aheads:
            started = time.process_time()
            packs = packs_of(lengths, budgets, look_ahead)
            seconds = time.process_time() - started
            before = token_fill(lengths, first_fit_packs_of(lengths, budgets, look_ahead), budgets)
            now = token_fill(lengths, packs, budgets)
            rows.append(
                [
                    f"{tokens_per_image} tokens per image, text budget {budgets.text}, "
                    f"{look_ahead} samples",
                    *(f"{100 * value:.1f}" for value in (max(before), max(now), min(now))),
                    f"{1000 * seconds / len(packs):.2f}",
                ]
            )
    return rows


def balance_table(num_ranks: list[int], count: int) -> Table:
    """The dearest rank's pack over the mean, where a visual token costs more or less than a text
    token."""
    rows = []
    ranks = [mixed_lengths(count, seed=seed) for seed in range(max(num_ranks))]
    budgets = SampleLengths.join(ranks).budgets(images=8)
    for name, make in (("first fit", first_fit_packs_of), ("now", packs_of)):
        packs = [make(lengths, budgets, 64) for lengths in ranks]
        for number in num_ranks:
            figures = [_imbalance(ranks[:number], packs[:number], cost) for cost in (0.5, 1.0, 2.0)]
            rows.append([f"{number} ranks, {name}", *(f"{figure:.3f}" for figure in figures)])
    return rows


def _imbalance(
    ranks: list[SampleLengths], packs: list[list[np.ndarray]], visual_cost: float
) -> float:
    """Over steps of one pack, the mean of the dearest rank's cost over all ranks' mean cost."""
    steps = min(map(len, packs))
    costs = np.array(
        [
            [visual_cost * lengths.visual[p].sum() + lengths.text[p].sum() for p in mine[:steps]]
            for lengths, mine in zip(ranks, packs, strict=True)
        ]
    )
    return float((costs.max(axis=0) / costs.mean(axis=0)).mean())


def worker_memory(folder: Path) -> float:
    """MB that a loader process has for itself while it works on the pictures."""
    loader = our_loader(folder, num_workers=1)
    list(islice(iter(loader), 30))
    pid = loader._loader._iterator._workers[0].pid  # type: ignore[union-attr]
    return _private_memory(pid)


def _private_memory(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000


def growth_table(sizes: list[int]) -> Table:
    """Start-up, resume and memory with more and more records of text."""
    return [[f"{size:,} records", *_in_a_fork(partial(_growth, size))] for size in sizes]


def _growth(size: int) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="loader-") as name:
        folder = Path(name)
        make_processor(folder)
        turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "A seven."}]
        records = ({"id": number, "conversations": turns} for number in range(size))
        write_jsonl(records, folder / "train.jsonl")
        loader = our_loader(folder)  # what is imported and compiled is not the records'
        next(iter(loader))
        before = _private_memory(os.getpid())
        started = time.perf_counter()
        loader = our_loader(folder)
        built = time.perf_counter()
        batches = iter(loader)
        next(batches)
        first = time.perf_counter()
        memory = _private_memory(os.getpid()) - before
        list(islice(batches, 20))
        state = loader.save_state()
        resumed = our_loader(folder)
        begun = time.perf_counter()
        resumed.restore_state(state)
        next(iter(resumed))
        end = time.perf_counter()
    seconds = (built - started, first - built, end - begun)
    return [*(f"{value:.3f}" for value in seconds), f"{memory:.1f}", str(len(state))]


def _in_a_fork(work: Callable[[], list[str]]) -> list[str]:
    """In a process of its own, whose memory is not that of what was measured before."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(work()))
    process.start()
    result = ours.recv()
    process.join()
    return result


def waiting_share(steps: int) -> float:
    """Share of a training run of the demo's model that waits for data, without its first steps."""
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        project = make_project(Path(folder), steps)
        run_to_the_end(project, "run")
        shares = scalars(project, "run", "data wait share")
    return float(np.mean([share for step, share in shares if step > 20]))


def loader_report(arguments: argparse.Namespace) -> str:
    """Measure everything; the whole Markdown file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        speeds, ratio = cpu_times(Path(folder), arguments.packs, arguments.rounds)
        memory = worker_memory(Path(folder))
    parts = [
        report.header("The loader", arguments.command, torch.device("cpu")),
        f"\n## CPU time\n\nConversations of 1 to 4 questions about a JPEG of {SIDE} x {SIDE} "
        f"pixels, {SAMPLES} a pack; {arguments.rounds} rounds of {arguments.packs} packs of each, "
        "in turn. Images per second are as many.\n",
        report.table(["one core", "samples per second of CPU time"], speeds),
        f"\nOurs over the plain one's, within a round: {report.spread(ratio)}. A loader process "
        f"has {memory:.0f} MB for itself (64 samples in its buffer, two packs).\n",
        "## Fill\n\nPercent of a budget that hold tokens, over all packs, on drawn lengths: the "
        "budget that binds, by first fit and now; the other one now.\n",
        report.table(
            ["", "first fit", "now", "other budget", "ms of CPU per pack"],
            fill_table([32, 64, 128], arguments.samples),
        ),
        "\n## Balance\n\nEvery rank packs for itself; the dearest pack of a step over the mean, "
        "where a visual token costs 0.5, 1 or 2 text tokens.\n",
        report.table(["", "0.5", "1", "2"], balance_table([8, 64], arguments.samples // 5)),
        "\n## Number of records\n",
        report.table(
            [
                "",
                "start (s)",
                "first pack (s)",
                "resume and a pack (s)",
                "MB",
                "state (bytes)",
            ],
            growth_table(arguments.records),
        ),
    ]
    if arguments.steps:
        share = waiting_share(arguments.steps)
        parts.append(
            f"\n## Waiting\n\nA run of the demo's model with one loader process waits for data "
            f"{100 * share:.2f} % of its time ({arguments.steps} steps, the first 20 left out)."
        )
    return "\n".join(parts)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `command` is what to type to repeat it."""
    parser = ToolParser(__doc__, prog="python -m benchmarks.bench_loader")
    parser.add_argument("--packs", type=int, default=16, help="of a round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=10_000, help="whose lengths are drawn")
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=120, help="of a training run; 0: none")
    parser.add_argument("--output", type=Path, help="Markdown file; printed in any case")
    parsed = parser.parse_args(arguments)
    parsed.command = f"{parser.prog} {shlex.join(arguments)}".strip()
    return parsed


def main(arguments: list[str] | None = None) -> int:
    return report.run(loader_report, parse(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
