"""The whole job on one small machine: backbones, conversion, three stages, evaluation, export.

    python examples/quickstart/demo.py --attention dattn --output runs/demo-dattn

Every step is a command that also works by hand, and is printed before it runs. A step whose result
exists is not repeated, so the same call continues an interrupted demo; training continues from its
last checkpoint.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_dattn.attention import PRESETS
from megatron_dattn.errors import EXIT_USER_ERROR, ConfigError
from megatron_dattn.runtime.log import silence_import_warnings
from megatron_dattn.runtime.tool import ToolParser

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("stage1", "stage2", "stage3")


@dataclass(frozen=True)
class Step:
    """One command."""

    title: str
    command: list[str]
    result: Path | None = None
    """Exists once the step is done; None: run it every time."""
    folder: Path | None = None
    """Made by this step alone: a half-made one is removed before the step runs again."""


@dataclass(frozen=True)
class Demo:
    """What one demo trains, and where its files are."""

    output: Path
    """Folder of its checkpoints, pictures and answers."""
    shared: Path
    """Folder of data, tokenizer and backbones, which several demos may have in common."""
    attention: str
    processes: int
    """Tensor-parallel processes."""
    training: tuple[str, ...] = ()
    """More words for pretrain_vlm.py, in every stage."""
    steps: Mapping[str, int] = field(default_factory=dict)
    """Steps to train by stage, where not the recipe's."""


def plan(demo: Demo) -> list[Step]:
    """The demo's commands in order."""
    return [*prepare(demo), *train_and_evaluate(demo)]


def prepare(demo: Demo) -> list[Step]:
    """Data, tokenizer and backbones: what does not depend on the attention."""
    shared, data = demo.shared, demo.shared / "data"
    steps = [
        Step(
            "compose handwritten digits into images with captions and questions",
            [*module("make_data"), "--output", str(data)],
            data / "heldout.json",
            data,
        ),
        Step(
            "train a sentencepiece tokenizer",
            [*module("make_tokenizer"), "--output", str(shared / "tokenizer")],
            shared / "tokenizer" / "tokenizer.json",
        ),
        Step(
            "pretrain the backbones and save them as Hugging Face checkpoints",
            [*module("make_backbones"), "--tokenizer", str(shared / "tokenizer")]
            + ["--output", str(shared / "backbones")],
            shared / "backbones" / "mistral" / "model.safetensors",
        ),
    ]
    for stage in STAGES:
        steps += prepare_steps(stage, data)
    return steps


def train_and_evaluate(demo: Demo) -> list[Step]:
    """Conversion, three stages, pictures, accuracy."""
    output, base, backbones = demo.output, demo.output / "base", demo.shared / "backbones"
    steps = [
        Step(
            "convert the backbones for Megatron",
            [*tool("convert_checkpoint"), "import", "--vision", str(backbones / "siglip")]
            + ["--language", str(backbones / "mistral"), "--output", str(base)]
            + ["--attention", demo.attention, "--dtype", "fp32"],
            base / "latest.json",
            base,
        ),
    ]
    previous = base
    for stage in STAGES:
        steps.append(train_step(stage, demo, previous))
        previous = output / stage
    steps += [
        Step(
            "draw the loss curves",
            [*tool("plot_training"), *(str(output / stage / "tensorboard") for stage in STAGES)]
            + ["--names", *STAGES, "--smoothing", "0.6"]
            + ["--output", str(output / "loss.png")],
        ),
        Step(
            "ask the held-out questions",
            [*module("evaluate"), "--checkpoint", str(output / "stage3")]
            + ["--data", str(demo.shared / "data"), "--output", str(output)],
        ),
    ]
    return steps


def export_and_ask(demo: Demo) -> list[Step]:
    """Leave the training stack: a Hugging Face folder, and answers through transformers alone."""
    output = demo.output
    model, data = output / "model", demo.shared / "data"
    return [
        Step(
            "export the trained model for transformers",
            [*tool("convert_checkpoint"), "export", "--checkpoint", str(output / "stage3")]
            + ["--output", str(model), "--metrics", str(output / "accuracy.json")]
            + ["--name", output.name],
            model / "config.json",
        ),
        Step(
            "ask the exported model, and compare with the answers before export",
            [sys.executable, "examples/quickstart/ask.py", "--model", str(model)]
            + ["--data", str(data), "--answers", str(output / "answers.json")],
        ),
    ]


def why_not_exported(demo: Demo) -> str:
    """The reason why the trained model has no Hugging Face form; empty if it has one."""
    silence_import_warnings()
    # Imported late: --help should not wait for torch and megatron-core.
    from megatron_dattn.config.cli import load_config
    from megatron_dattn.conversion.families.exportable import check_exportable

    try:
        check_exportable(load_config(demo.output / "stage3" / "config.yaml").model)
    except ConfigError as error:
        return str(error)
    return ""


def module(name: str) -> list[str]:
    return [sys.executable, "-m", f"examples.quickstart.{name}"]


def tool(name: str) -> list[str]:
    return [sys.executable, f"tools/{name}.py"]


def prepare_steps(stage: str, data: Path) -> list[Step]:
    """Index the stage's training and validation file for the loader."""
    prepared = data / "prepared" / stage
    return [
        Step(
            f"prepare the {section} data of {stage}",
            [*tool("prepare_data"), str(data / name), "--image-root", str(data)]
            + ["--output", str(prepared / section), "--section", section],
            prepared / section / f"{section}.yaml",
            prepared / section,
        )
        for section, name in (
            ("train", f"{stage}.json"),
            ("validation", f"{stage}_validation.json"),
        )
    ]


def train_step(stage: str, demo: Demo, previous: Path) -> Step:
    """`torchrun pretrain_vlm.py` for one stage, with tensor and sequence parallelism."""
    prepared = demo.shared / "data" / "prepared" / stage
    folder, processes = demo.output / stage, demo.processes
    recipe = ROOT / "examples" / "quickstart" / f"{stage}.yaml"
    configs = [
        demo.output / "base" / "config.yaml",
        recipe,
        prepared / "train" / "train.yaml",
        prepared / "validation" / "validation.yaml",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "pretrain_vlm.py"]
    for config in configs:
        command += ["--config", str(config)]
    command += ["--tensor-model-parallel-size", str(processes)]
    command += ["--sequence-parallel", "true" if processes > 1 else "false"]
    command += ["--load", str(previous), "--save", str(folder)]
    command += ["--tensorboard-dir", str(folder / "tensorboard")]
    if stage in demo.steps:
        command += ["--training.train_iters", str(demo.steps[stage])]
    command += demo.training
    return Step(f"train {stage}", command, folder / "exit_reason.json")


def is_done(step: Step) -> bool:
    """True if a step's result is there; a training run must have ended by itself."""
    if step.result is None or not step.result.exists():
        return False
    if step.result.name != "exit_reason.json":
        return True
    return json.loads(step.result.read_text())["reason"] == "finished"


def run(steps: list[Step]) -> None:
    """Run what is not done yet. Exits with the failing command's status."""
    for number, step in enumerate(steps, start=1):
        print(f"\n[{number}/{len(steps)}] {step.title}", flush=True)
        if is_done(step):
            print(f"    done before: {step.result}", flush=True)
            continue
        print(f"    {shlex.join(step.command)}", flush=True)
        if step.folder is not None:
            shutil.rmtree(step.folder, ignore_errors=True)
        start = time.monotonic()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        status = subprocess.run(step.command, cwd=ROOT, env=environment, check=False).returncode
        if status:
            print(
                f"error: step {number} ({step.title}) ended with status {status}; "
                "mend it and start the same command again",
                file=sys.stderr,
            )
            sys.exit(status)
        if step.result is not None and not is_done(step):
            print(
                f"error: step {number} ({step.title}) was stopped before its end; start the same "
                "command again to go on",
                file=sys.stderr,
            )
            sys.exit(EXIT_USER_ERROR)
        print(f"    {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--attention", default="dattn", choices=PRESETS, help="attention preset")
    parser.add_argument("--output", type=Path, default=None, help="folder for everything made")
    parser.add_argument("--processes", type=int, default=2, help="tensor-parallel processes")
    arguments = parser.parse_args()
    output = (arguments.output or Path(f"runs/demo-{arguments.attention}")).resolve()
    start = time.monotonic()
    demo = Demo(output, output, arguments.attention, arguments.processes)
    run(plan(demo))
    reason = why_not_exported(demo)
    if reason:
        print(f"\nNot exported: {reason}")
    else:
        run(export_and_ask(demo))
    print(f"\nThe demo took {time.monotonic() - start:.0f} s. In {output}:")
    print("    loss.png         loss curves of the three stages")
    print("    samples.png      held-out images with the model's answers")
    print("    accuracy.json    the table above as numbers")
    if not reason:
        print("    model/           the trained model for transformers, see its README.md")
    print("    stage3/          the trained model; ask it:")
    image = output / "data" / "images" / "heldout" / "000000.png"
    print(
        f"    {sys.executable} tools/generate.py --checkpoint {output / 'stage3'} "
        f"--image {image} --question 'Read all digits in order.'"
    )


if __name__ == "__main__":
    main()
