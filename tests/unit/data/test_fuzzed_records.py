"""Mutated records and images end as trained, fixed, skipped and counted, or as one error by policy;
and the check says of each what training does.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_dattn.data.check import RecordChecker
from megatron_dattn.data.encoder import SampleEncoder
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.policies import Policies
from megatron_dattn.data.problems import LENGTH_PROBLEMS, PROBLEMS
from megatron_dattn.data.record_source import RawRecord
from megatron_dattn.data.rejection import Reason
from megatron_dattn.data.skipped_samples import LoaderCounters, count_pack
from megatron_dattn.data.task_encoder import RejectedSample, VLMTaskEncoder
from megatron_dattn.data.template import ConversationTokenizer
from megatron_dattn.data.videos import has_av
from megatron_dattn.errors import DataError
from tests.support.planted_defects import encoded, png
from tests.unit.data.builders import make_tokenizer

EXAMPLES = 2_000
SHARE = 500  # of the examples, in `make test`
MAX_PIXELS = 5_000

Verdict = tuple[str, str | None, frozenset[str]]

TOKENIZERS = {
    name: ConversationTokenizer(make_tokenizer(), name) for name in ("mistral_v3", "plain")
}
NOISE = Image.effect_noise((40, 30), 90).convert("RGB")
FILES = [
    *(encoded(NOISE, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP")),
    *(
        encoded(NOISE, kind, save_all=True, append_images=[NOISE])
        for kind in ("PNG", "GIF", "WEBP")
    ),
    encoded(NOISE.convert("CMYK"), "JPEG"),
    encoded(NOISE, "JPEG", progressive=True, comment=b"a note"),
    encoded(NOISE.resize((100, 80)), "PNG"),
    png(4, 4, 16, 2, bytes(24)),
    b"",
]
VALUES = [
    *(None, True, 0, -1, 10**30, 1.5, "", " ", "<image>", "[INST]", "</s>", "\ud800", "\0"),
    *("human", "gpt", "system", "user", "Model", "tool", [], {}, [None], {"type": "image"}),
    *("x.bin", "../x.bin", "none.png", "https://a/b.png", "a red square " * 40, "x" * 5_000),
]


def base_records() -> list[Any]:
    """Sound ones of every form, which mutations begin with."""
    ask, answer = (
        {"from": "human", "value": "<image>\nwhat ?"},
        {"from": "gpt", "value": "a square"},
    )
    both = {"from": "human", "value": "<video> and <image>"}
    more = [{"from": "human", "value": "where ?"}, {"from": "gpt", "value": "left"}]
    parts = [{"type": "image", "image": "x.bin"}, {"type": "text", "text": "what ?"}]
    # Mutated, its frames may become a file.
    film = {"video": ["x.bin"] * 3, "image": "x.bin", "conversations": [both, answer]}
    return [
        *([film] if has_av() else []),
        {"id": 1, "image": "x.bin", "conversations": [ask, answer]},
        {"id": "a", "image": ["x.bin", "x.bin"], "conversations": [ask, answer, ask, answer]},
        {"image": "x.bin", "conversations": [ask, answer, *more], "system": "Be brief."},
        {"conversations": more * 3},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]},
        {"images": ["x.bin"], "conversations": [answer, ask, answer]},
        {"image": ["x.bin"] * 3, "conversations": [ask, answer, ask, answer, ask, answer]},
    ]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in list(items):
        found.append((value, key))
        if isinstance(inner, dict | list):
            found += places(inner)
    return found


def mutated_record(chance: random.Random) -> Any:
    """A record with a few values exchanged, doubled, moved or left out."""
    record = json.loads(json.dumps(chance.choice(base_records())))
    for _ in range(chance.choice([0, 0, 1, 1, 2])):
        found = places(record)
        if not found:
            break
        container, key = chance.choice(found)
        how = chance.randrange(5)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, list):
            container.insert(key, json.loads(json.dumps(container[key])))
        elif how == 2 and isinstance(container[key], str):
            text = container[key]
            cut = chance.randrange(len(text) + 1)
            container[key] = text[:cut] + str(chance.choice(VALUES)) + text[cut:]
        elif how == 3:
            other, place = chance.choice(found)
            container[key] = json.loads(
                json.dumps(other.get(place) if isinstance(other, dict) else 0)
            )
        else:
            container[key] = json.loads(json.dumps(chance.choice(VALUES)))
    return record


def mutated_line(chance: random.Random) -> bytes:
    line = json.dumps(mutated_record(chance)).encode()
    return mutated_bytes(line, chance) if chance.random() < 0.08 else line


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes with some of them changed, cut out, doubled or the end cut off."""
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        place = chance.randrange(len(changed) + 1)
        how = chance.randrange(5)
        if how == 0:
            del changed[place:]
        elif how == 1:
            del changed[place : place + chance.randrange(1, 9)]
        elif how == 2:
            changed[place:place] = changed[place : place + 20]
        else:
            changed[place : place + 1] = bytes([chance.randrange(256)])
    return bytes(changed)


def drawn_policies(chance: random.Random) -> tuple[Policies, bool]:
    """Policies, and whether what is too long is cut."""
    truncate = chance.random() < 0.5
    chosen: dict[str, Any] = {}
    for problem in PROBLEMS:
        if not problem.checked_only and chance.random() < 0.3:
            can_fix = problem.fix and problem.name not in LENGTH_PROBLEMS
            chosen[problem.name] = chance.choice(["skip", "fail", *(["fix"] * 2 * bool(can_fix))])
    long_samples = "truncate" if truncate else "skip"
    bad_samples = chance.choice(["skip", "skip", "fail"])
    return Policies.of(chosen, bad_samples=bad_samples, long_samples=long_samples), truncate


def trained(line: bytes, root: Path, encoder: SampleEncoder) -> Verdict:
    """What the loader's chain makes of a line, and how it is counted."""
    policies = encoder.policies
    chain = VLMTaskEncoder(encoder, max_samples=1, pad_id=0, keep_order=True)
    encoded_sample = chain.encode_record(RawRecord("set-0", 0, 0, line, str(root)))
    pack = chain.pack_selected_samples([encoded_sample])
    counters = LoaderCounters()
    used = 0 if pack.batch is None else pack.batch.num_samples
    reason = encoded_sample.rejection.reason if isinstance(encoded_sample, RejectedSample) else None
    try:
        count_pack(counters, used, pack.rejections, pack.fixed, failing=policies.failing)
    except DataError:
        return "failed", reason, frozenset()
    assert counters.seen == 1
    if reason is not None:
        assert counters == LoaderCounters(1, {str(reason): 1})
        return "skipped", reason, frozenset()
    assert used == 1
    return "fixed" if counters.fixed else "used", None, frozenset(counters.fixed)


def checked(record: Any, checker: RecordChecker) -> Verdict:
    found = checker(record)
    if found.rejections:
        return found.outcome, found.rejections[0].problem, frozenset()
    return found.outcome, None, frozenset(str(finding.problem) for finding in found.findings)


def fuzz(number: int, root: Path) -> Verdict:
    """One example: the same verdict by the loader and by both ways of checking."""
    chance = random.Random(number)
    data = chance.choice(FILES)
    (root / "x.bin").write_bytes(mutated_bytes(data, chance) if chance.random() < 0.4 else data)
    line = mutated_line(chance)
    policies, truncate = drawn_policies(chance)
    encoder = SampleEncoder(
        tokenizer=TOKENIZERS[chance.choice(["mistral_v3", "mistral_v3", "mistral_v3", "plain"])],
        preprocessor=ImagePreprocessor(
            16,
            max_pixels=MAX_PIXELS,
            image_fit=chance.choice(["resize", "pad", "crop", "anyres"]),
            video_frames=2,
        ),
        grid=(2, 2),
        visual_budget=24,
        text_budget=64,
        truncate=truncate,
        policies=policies,
    )
    verdict = trained(line, root, encoder)
    checker = RecordChecker(root, MAX_PIXELS, encoder, policies)
    assert checked(line, checker) == verdict
    try:
        record = json.loads(line)
    except ValueError:
        assert verdict[1] == Reason.BAD_RECORD
    else:
        assert checked(record, checker) == verdict
    return verdict


def outcomes(numbers: range, root: Path) -> tuple[Counter[str], set[str]]:
    """How examples end, and the problems that were met."""
    verdicts = [fuzz(number, root) for number in numbers]
    met = {problem for _, reason, fixed in verdicts for problem in (reason, *fixed) if problem}
    return Counter(outcome for outcome, _, _ in verdicts), met


def test_some_examples_end_alike_in_check_and_training(tmp_path: Path) -> None:
    ends, met = outcomes(range(SHARE), tmp_path)
    assert all(ends[outcome] > SHARE // 20 for outcome in ("used", "fixed", "skipped", "failed"))
    assert len(met) > 12


@pytest.mark.slow
def test_all_examples_end_alike_in_check_and_training(tmp_path: Path) -> None:
    ends, met = outcomes(range(EXAMPLES), tmp_path)
    assert ends.total() == EXAMPLES
    assert met == set(Reason) - {Reason.TEMPLATE, *(() if has_av() else (Reason.BROKEN_VIDEO,))}


@seed(0)
@settings(
    max_examples=100,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(number=st.integers(min_value=EXAMPLES))
def test_no_other_example_ends_otherwise(number: int, tmp_path: Path) -> None:
    fuzz(number, tmp_path)
