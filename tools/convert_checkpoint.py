"""Convert checkpoints between Hugging Face and Megatron, look into both, and compare them.

    python tools/convert_checkpoint.py import --vision siglip/ --language mistral/ --output base/
    python tools/convert_checkpoint.py import --vision siglip/ --language a.gguf --output base/
    python tools/convert_checkpoint.py import --model llava-1.5/ --output base/
    python tools/convert_checkpoint.py export --checkpoint run/ --output model/
    python tools/convert_checkpoint.py inspect base/
    python tools/convert_checkpoint.py verify base/
    python tools/convert_checkpoint.py verify run/ --against model/

Import: the inputs are Hugging Face folders (config.json and safetensors). Of two, the language
folder, or a GGUF file in its place, also holds the tokenizer, the vision folder the image
processor; a single one is a model of LLaVA-1.5's format or an export of ours. The output starts a
stage: pass it to pretrain_vlm.py as `--checkpoint.load base/` together with `--config
base/config.yaml`.

Export: a run's checkpoint, by default the newest, becomes a folder that transformers loads, see
docs/huggingface.md.

Each command has its own --help.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dattn.errors import ConfigError
from megatron_dattn.runtime.log import setup_logging, silence_import_warnings
from megatron_dattn.runtime.tool import ToolParser, bar, run_tool

if TYPE_CHECKING:
    from megatron_dattn.conversion.hf_import.plan import ImportPlan
    from megatron_dattn.conversion.verify.verdict import Comparison

# The package is imported inside the commands: --help should not wait for torch and megatron-core.

EXIT_DIFFERENT = 1
# fp32 sums in another order through all layers; BF16 has 8 bits and rounds after every operation.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}


def add_import(commands: "argparse._SubParsersAction[ToolParser]") -> None:
    parser = commands.add_parser("import", help="Hugging Face to Megatron")
    parser.set_defaults(run=run_import)
    parser.add_argument("--vision", type=Path, help="encoder's folder")
    parser.add_argument("--language", type=Path, help="language model's folder, or GGUF file")
    parser.add_argument("--model", type=Path, help="instead of both: a vision-language model's")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument(
        "--attention",
        help="attention preset; by default dattn for two folders, and a whole model's own",
    )
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], default="bf16", help="dtype of the stored weights"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything and say what would be written"
    )


def run_import(options: argparse.Namespace) -> int:
    from megatron_dattn.conversion.hf_import.plan import plan_import, plan_whole_import
    from megatron_dattn.conversion.hf_import.source import language_folder

    vision, language, whole = options.vision, options.language, options.model
    chosen = {"dtype": options.dtype}
    if options.attention is not None:
        chosen["attention"] = options.attention
    if whole is not None and vision is None and language is None:
        _carry_out(plan_whole_import(whole, options.output, **chosen), options.dry_run)
    elif whole is None and vision is not None and language is not None:
        with language_folder(language) as folder:
            plan = plan_import(vision, folder, options.output, origin=language, **chosen)
            _carry_out(plan, options.dry_run)
    else:
        raise ConfigError("import takes either --vision and --language, or --model alone")
    return 0


def _carry_out(plan: "ImportPlan", dry_run: bool) -> None:
    from megatron_dattn.conversion.hf_import.run import write_import

    print(plan.summary())
    if dry_run:
        return
    with bar("importing", plan.num_bytes) as advance:
        write_import(plan, advance)


def add_export(commands: "argparse._SubParsersAction[ToolParser]") -> None:
    parser = commands.add_parser("export", help="Megatron to Hugging Face")
    parser.set_defaults(run=run_export)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="folder of a run, or run/step-0000400"
    )
    parser.add_argument("--step", type=int, help="whose checkpoint; the newest sound one without")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="largest file of weights, in 10^9 bytes"
    )
    parser.add_argument("--name", help="title of the model card; the output folder's name without")
    parser.add_argument("--license", help="for the model card, as the hub spells it")
    parser.add_argument(
        "--metrics",
        type=Path,
        help="for the model card, an evaluation's JSON file; the run's accuracy.json without",
    )


def run_export(options: argparse.Namespace) -> int:
    from megatron_dattn.conversion.hf_export.run import ExportOptions, export_checkpoint

    if not (options.max_shard_gb > 0 and math.isfinite(options.max_shard_gb)):
        raise ConfigError(f"--max-shard-gb must be positive and finite, got {options.max_shard_gb}")
    largest = int(options.max_shard_gb * 10**9)
    chosen = ExportOptions(largest, options.license, options.metrics, options.step, options.name)
    export_checkpoint(options.checkpoint, options.output, chosen, bar)
    return 0


def add_inspect(commands: "argparse._SubParsersAction[ToolParser]") -> None:
    parser = commands.add_parser("inspect", help="list tensors and count parameters, of either")
    parser.set_defaults(run=run_inspect)
    parser.add_argument("folder", type=Path, help="Hugging Face folder, run folder or checkpoint")
    parser.add_argument("--every-layer", action="store_true", help="one line per layer and tensor")


def run_inspect(options: argparse.Namespace) -> int:
    from megatron_dattn.conversion.inspect import list_tensors, module_table, tensor_table

    entries = list_tensors(options.folder)
    print(tensor_table(entries, every=options.every_layer))
    print()
    print(module_table(entries))
    return 0


def add_verify(commands: "argparse._SubParsersAction[ToolParser]") -> None:
    parser = commands.add_parser("verify", help="compare outputs with the Hugging Face models'")
    parser.set_defaults(run=run_verify)
    parser.add_argument("folder", type=Path, help="of a run or an import, or run/step-0000400")
    parser.add_argument("--against", type=Path, help="its export; code in there is run")
    parser.add_argument("--vision", type=Path, help="encoder's folder, if it has moved")
    parser.add_argument("--language", type=Path, help="language model's folder, if it has moved")
    parser.add_argument("--model", type=Path, help="whole model's folder, if it has moved")
    parser.add_argument("--tokens", type=int, nargs="+", help="token ids; random without")
    parser.add_argument("--question", help="with --against; random texts and images without")
    parser.add_argument("--image", type=Path, nargs="+", default=[], help="with --question")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="to compute in")
    parser.add_argument("--tolerance", type=float, help=f"relative; by default {TOLERANCES}")


def run_verify(options: argparse.Namespace) -> int:
    tolerance = TOLERANCES[options.dtype] if options.tolerance is None else options.tolerance
    compare = _compare_export if options.against else _compare_import
    comparisons = compare(options, tolerance)
    for comparison in comparisons:
        print(_line(comparison, tolerance))
    return 0 if all(each.agrees(tolerance) for each in comparisons) else EXIT_DIFFERENT


def _line(found: "Comparison", tolerance: float) -> str:
    """What was compared, how, and the verdict."""
    text = (
        f"{found.what}: largest relative difference {found.largest:.2e} over {found.num_values} "
        "values"
    )
    if found.rounded_to is not None:
        text += f", Hugging Face's weights rounded to {found.rounded_to} as the checkpoint's"
    if found.exact is not None:
        text += (
            f"; in float64 {found.exact:.2e}, from which ours is {found.our_error:.2e} away and "
            f"Hugging Face's {found.their_error:.2e}"
        )
    if not found.agrees(tolerance):
        return f"{text}: DIFFER by more than {tolerance:g}"
    return f"{text}: agree" if found.exact is None else f"{text}: agree but for rounding"


def _compare_import(options: argparse.Namespace, tolerance: float) -> "list[Comparison]":
    from megatron_dattn.conversion.verify.imported import verify_checkpoint

    if options.question or options.image:
        raise ConfigError("--question and --image are for --against; --tokens gives a text here")
    return verify_checkpoint(
        options.folder,
        vision=options.vision,
        language=options.language,
        whole=options.model,
        tokens=options.tokens,
        dtype=options.dtype,
        tolerance=tolerance,
        progress=bar,
    )


def _compare_export(options: argparse.Namespace, tolerance: float) -> "list[Comparison]":
    from megatron_dattn.conversion.verify.exported import verify_export

    if options.vision or options.language or options.model or options.tokens:
        raise ConfigError(
            "--against compares with an export: no --vision, --language, --model, --tokens"
        )
    if options.image and not options.question:
        raise ConfigError("--image stands in front of a --question; give one")
    return verify_export(
        options.folder,
        options.against,
        question=options.question,
        images=options.image,
        dtype=options.dtype,
        tolerance=tolerance,
        progress=bar,
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_import, add_export, add_inspect, add_verify):
        add(commands)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)

    def left() -> str:
        output = getattr(options, "output", None)
        is_absent = output is not None and not output.exists()
        return f"; {output} was not written" if is_absent else ""

    def work() -> int:
        setup_logging(stream=sys.stderr)
        silence_import_warnings()
        return options.run(options)

    return run_tool(work, left)


if __name__ == "__main__":
    sys.exit(main())
