"""The readers' results as the tables of docs/huggingface.md, between two marks."""

from pathlib import Path

from tests.readers.versions import READERS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "huggingface.md"
BEGIN, END = "<!-- readers: begin -->", "<!-- readers: end -->"
STOCK = "s_attn"

# By version, export and check: "ok", "refused: ...", "not supported: ..." or "failed: ...".
Results = dict[str, dict[str, dict[str, str]]]

# What is no failure, and how a reason is introduced.
_EXCUSES = {"refused": "Refused, with that message:", "not supported": "Not supported:"}


def tables(results: Results) -> str:
    """Both tables in Markdown: of the exports with code of ours, and of the stock LLaVA."""
    own = {
        version: {name: found for name, found in exports.items() if name != STOCK}
        for version, exports in results.items()
    }
    own = {version: exports for version, exports in own.items() if exports}
    names = list(next(iter(own.values())))
    stock = {version: {STOCK: exports[STOCK]} for version, exports in results.items()}
    listed = ", ".join(f"`{name}`" for name in names)
    return "\n".join(
        [
            BEGIN,
            f"With code of ours, presets {listed}: how many of the {len(names)} pass.",
            "",
            *_rows(own),
            "",
            f"The stock LLaVA, `{STOCK}`.",
            "",
            *_rows(stock),
            END,
        ]
    )


def _rows(results: Results) -> list[str]:
    """One row for each check, one column for each version."""
    first = next(iter(results.values()))
    checks = list(next(iter(first.values())))
    rows = [f"| transformers | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for check in checks:
        cells = (_cell({n: found[check] for n, found in e.items()}) for e in results.values())
        rows.append(f"| {check} | {' | '.join(cells)} |")
    return [*rows, *_reasons(results)]


def _cell(outcomes: dict[str, str]) -> str:
    """How many exports pass, and what becomes of those that do not."""
    passed = [name for name, outcome in outcomes.items() if outcome == "ok"]
    excused = [kind for outcome in outcomes.values() for kind in _EXCUSES if _is(kind, outcome)]
    failed = [name for name, outcome in outcomes.items() if outcome.startswith("failed")]
    parts = [f"{len(passed)}"] if passed or failed else []
    for kind in dict.fromkeys(excused):
        number = excused.count(kind)
        parts.append(kind if number == len(outcomes) else f"{number} {kind}")
    if failed:
        parts.append(f"**failed: {', '.join(failed)}**")
    return ", ".join(parts)


def _is(kind: str, outcome: str) -> bool:
    return outcome.startswith(f"{kind}: ")


def _reasons(results: Results) -> list[str]:
    """What is meant by "refused" and "not supported"."""
    reasons = {
        f"{text} {check}: {outcome.removeprefix(f'{kind}: ')}."
        for exports in results.values()
        for found in exports.values()
        for check, outcome in found.items()
        for kind, text in _EXCUSES.items()
        if _is(kind, outcome)
    }
    return ["", *sorted(reasons)] if reasons else []


def write(results: Results) -> None:
    """Put the tables in place of those in the document."""
    assert list(results) == [reader.version for reader in READERS], "a table of all versions"
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(before + tables(results) + after, encoding="utf-8")
