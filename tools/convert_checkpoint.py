"""Convert Hugging Face checkpoints into a Megatron one.

    python tools/convert_checkpoint.py import --vision siglip/ --language mistral/ --output base/

Both inputs are Hugging Face folders (config.json and safetensors); the language folder also holds
the tokenizer, the vision folder the image processor. The output starts stage 1: pass it to
pretrain_vlm.py as `--checkpoint.load base/` together with `--config base/config.yaml`.
"""

import argparse
import sys
from pathlib import Path

from megatron_dattn.errors import EXIT_USER_ERROR, UserError
from megatron_dattn.runtime.log import setup_logging, silence_import_warnings


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    import_ = commands.add_parser("import", help="Hugging Face to Megatron")
    import_.add_argument("--vision", type=Path, required=True, help="SigLIP folder")
    import_.add_argument("--language", type=Path, required=True, help="Mistral folder")
    import_.add_argument("--output", type=Path, required=True, help="new folder")
    import_.add_argument("--attention", default="dattn", help="attention preset of the model")
    import_.add_argument(
        "--dtype", choices=["bf16", "fp32"], default="bf16", help="dtype of the stored weights"
    )
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse_arguments()
    setup_logging()
    silence_import_warnings()
    # Imported late: --help should not wait for torch and megatron-core.
    from megatron_dattn.conversion.import_hf import import_checkpoint

    try:
        import_checkpoint(
            arguments.vision,
            arguments.language,
            arguments.output,
            attention=arguments.attention,
            dtype=arguments.dtype,
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
