"""Ask a checkpoint or an export a file of questions, and score the answers.

    python tools/evaluate.py --checkpoint runs/stage3 --data questions.jsonl --metric vqa \\
        --output runs/evaluated/vqav2

Takes LLaVA's format of questions and plain records; right answers stand beside the questions, or in
a file of their own (--answers). Prints a table by category with 95 % intervals, and writes
answers.jsonl and scores.json. The same command continues an interrupted evaluation,
and scores answers that are there by another metric without asking again. Under torchrun the ranks
share the questions and give the answers of one. Code that an export brings is run.
"""

import argparse
import sys
from pathlib import Path

from megatron_dattn.data.templates import TEMPLATE_NAMES
from megatron_dattn.runtime.log import setup_logging, silence_import_warnings
from megatron_dattn.runtime.tool import ToolParser, run_tool


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a run or export")
    parser.add_argument("--data", type=Path, required=True, help=".json or .jsonl of questions")
    parser.add_argument(
        "--metric", required=True, help="exact, relaxed, vqa, anls, choice or caption"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of this evaluation")
    parser.add_argument("--answers", type=Path, help="right answers, where they stand apart")
    parser.add_argument("--image-root", type=Path, help="images' folder; else that of --data")
    parser.add_argument(
        "--category", default="category", help="field that divides the table (default: category)"
    )
    parser.add_argument("--prompt-suffix", default="", help="line behind every question")
    parser.add_argument("--limit", type=int, help="ask so many questions from the beginning alone")
    parser.add_argument("--template", choices=TEMPLATE_NAMES, help="a run's; its own by default")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--batch-size", type=int, default=32, help="of a rank (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of intervals and test (default: 0)")
    parser.add_argument("--against", type=Path, help="another run's answers.jsonl, to compare with")
    return parser.parse_args(arguments)


def work(arguments: argparse.Namespace) -> int:
    setup_logging(stream=sys.stderr)
    silence_import_warnings()
    # Imported late: --help should not wait for torch and megatron-core.
    from megatron_dattn.evaluation.run import Evaluation, evaluate
    from megatron_dattn.runtime.distributed import destroy_distributed, is_rank_0

    try:
        tables = evaluate(Evaluation(**vars(arguments)))
        if is_rank_0():
            print(tables)
    finally:
        destroy_distributed()
    return 0


def main(given: list[str] | None = None) -> int:
    arguments = parse_arguments(given)
    return run_tool(lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
