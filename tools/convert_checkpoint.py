"""Convert checkpoints between Hugging Face and Megatron.

    python tools/convert_checkpoint.py import --vision siglip/ --language mistral/ --output base/
    python tools/convert_checkpoint.py export --checkpoint run/ --output model/

Import: both inputs are Hugging Face folders (config.json and safetensors); the language folder also
holds the tokenizer, the vision folder the image processor. The output starts stage 1: pass it to
pretrain_vlm.py as `--checkpoint.load base/` together with `--config base/config.yaml`.

Export: a run's newest checkpoint becomes a folder that transformers loads, see docs/huggingface.md.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_dattn.errors import EXIT_USER_ERROR, ConfigError, UserError
from megatron_dattn.runtime.log import setup_logging, silence_import_warnings


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_import(commands)
    _add_export(commands)
    return parser.parse_args(arguments)


def _add_import(commands: Any) -> None:
    parser = commands.add_parser("import", help="Hugging Face to Megatron")
    parser.add_argument("--vision", type=Path, required=True, help="SigLIP folder")
    parser.add_argument("--language", type=Path, required=True, help="Mistral folder")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument("--attention", default="dattn", help="attention preset of the model")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp32"], default="bf16", help="dtype of the stored weights"
    )
    parser.set_defaults(run=_import)


def _add_export(commands: Any) -> None:
    parser = commands.add_parser("export", help="Megatron to Hugging Face")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a run")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="largest file of weights, in 10^9 bytes"
    )
    parser.add_argument("--license", help="for the model card, as the hub spells it")
    parser.set_defaults(run=_export)


# Imports are late: --help should not wait for torch and megatron-core.
def _import(arguments: argparse.Namespace) -> None:
    from megatron_dattn.conversion.import_hf import import_checkpoint

    import_checkpoint(
        arguments.vision,
        arguments.language,
        arguments.output,
        attention=arguments.attention,
        dtype=arguments.dtype,
    )


def _export(arguments: argparse.Namespace) -> None:
    from megatron_dattn.conversion.export_hf import ExportOptions, export_checkpoint

    if not arguments.max_shard_gb > 0:
        raise ConfigError(f"--max-shard-gb must be positive, got {arguments.max_shard_gb}")
    options = ExportOptions(int(arguments.max_shard_gb * 10**9), arguments.license)
    export_checkpoint(arguments.checkpoint, arguments.output, options)


def main() -> int:
    arguments = parse_arguments()
    setup_logging()
    silence_import_warnings()
    try:
        arguments.run(arguments)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
