"""Run in a reader's environment: every check on every export; this project is not installed there.

    python check.py VERSION RESULTS.json EXPORT...

RESULTS.json has what each check found, by export: "ok", "refused: ..." where the export says that
it does not do this, "not supported: ..." where that version does not and is not promised to, or
"failed: ...".
"""

import importlib.util
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import transformers
from checks import reading, training
from checks.given import Given, NotSupported, Refused

CHECKS: dict[str, Callable[[Given], None]] = {
    "load with the Auto classes": reading.load,
    "load with AutoModel, without head": reading.load_without_head,
    "template and processor": reading.inputs,
    "logits": reading.logits,
    "greedy": reading.greedy,
    "left-padded batch": reading.padded,
    "sampling": reading.sampling,
    "beams": reading.beams,
    "dynamic cache": reading.dynamic_cache,
    "static cache": reading.static_cache,
    "pipeline": reading.pipeline,
    "save and reload": reading.save,
    "Trainer, accumulation 1, 2, 4": training.accumulation,
    "gradient checkpointing": training.checkpointing,
    "PEFT LoRA: train, merge, save": training.lora,
}


def outcome(check: Callable[[Given], None], given: Given) -> str:
    try:
        check(given)
    except Refused as refusal:
        return f"refused: {refusal}"
    except NotSupported as reason:
        return f"not supported: {reason}"
    except Exception as error:  # whatever a version does is the finding
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "ok"


def main() -> None:
    version, results, *folders = sys.argv[1:]
    assert importlib.util.find_spec("megatron_dattn") is None, "readers do not have the project"
    assert transformers.__version__ == version, transformers.__version__
    assert Path(transformers.__file__).is_relative_to(sys.prefix), transformers.__file__
    transformers.logging.set_verbosity_error()
    found = {}
    for folder in map(Path, folders):
        found[folder.name] = {}
        for name, check in CHECKS.items():
            with tempfile.TemporaryDirectory() as scratch:
                given = Given(folder, Path(scratch))
                found[folder.name][name] = outcome(check, given)
        print(folder.name, found[folder.name], flush=True)
    Path(results).write_text(json.dumps(found, indent=1) + "\n")


main()
