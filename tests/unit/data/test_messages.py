"""No message about a sample is longer than a person reads, or more than one line."""

import json
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dattn.data.check import RecordChecker
from megatron_dattn.data.check_report import Report
from megatron_dattn.data.encoder import SampleEncoder
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.record_source import RawRecord
from megatron_dattn.data.rejection import Reason, Rejection
from megatron_dattn.data.skipped_samples import LoaderCounters, count_pack
from megatron_dattn.data.task_encoder import RejectedSample, VLMTaskEncoder, cook_record
from megatron_dattn.data.template import ConversationTokenizer
from megatron_dattn.errors import MAX_MESSAGE, DataError, UserError, quoted, shortened
from tests.unit.data.builders import make_tokenizer, record

MOST = 600  # characters of a line, "a few hundred": key, reason and message together

long_texts = st.builds(
    lambda piece, times: piece * times,
    st.sampled_from(
        [
            *("A", "\n", "\x1b[2J", "\u4e2d", "/x", "../", "<image>", "[INST] ", "data:", "\0"),
            *("\ud800", "../\ud800", "/\udcff", "\u202e", "\u2028", "\x85"),
        ]
    ),
    st.sampled_from([1, 90, 5000, 60_000]),
)
values = st.one_of(
    long_texts,
    st.lists(long_texts, min_size=1, max_size=3),
    st.dictionaries(long_texts, long_texts, min_size=1, max_size=2),
    st.just(10**4000),
)
turns = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system"]) | values, "value": long_texts | values}
)
hostile_records = st.fixed_dictionaries(
    {},
    optional={
        "conversations": st.lists(turns, min_size=1, max_size=3) | values,
        "image": values,
        "video": values,
        "system": values,
        "id": values,
        "key": values,
    },
)
spoken = record("<image>", "a", "x.png")
hostile_images = long_texts.map(lambda path: {**spoken, "image": path})
hostile_roles = long_texts.map(
    lambda role: {"conversations": [{"from": role, "value": "q"}, *spoken["conversations"]]}
)


@pytest.fixture(scope="module")
def encoder() -> SampleEncoder:
    return SampleEncoder(
        tokenizer=ConversationTokenizer(make_tokenizer(), "mistral_v3"),
        preprocessor=ImagePreprocessor(16),
        grid=(2, 2),
        visual_budget=16,
        text_budget=64,
    )


@contextmanager
def collected() -> Iterator[list[str]]:
    """The lines that are logged meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_dattn.data.rejection")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def rejection_of(value: Any, encoder: SampleEncoder, root: Path) -> Rejection | None:
    """What the loader's chain says of a record."""
    cooked = cook_record(RawRecord("set-0", 0, 0, json.dumps(value).encode(), str(root)))
    encode = VLMTaskEncoder(encoder, max_samples=1, pad_id=0, keep_order=True).encode_sample
    encoded = encode(cooked)
    return encoded.rejection if isinstance(encoded, RejectedSample) else None


def assert_short(lines: list[str]) -> None:
    for line in lines:
        assert len(line) <= MOST
        assert line.isprintable(), line


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=hostile_records | hostile_images | hostile_roles)
def test_hostile_records_give_short_lines(
    value: Any, encoder: SampleEncoder, tmp_path: Path
) -> None:
    rejection = rejection_of(value, encoder, tmp_path)
    if rejection is not None:
        with collected() as lines:
            count_pack(LoaderCounters(), 0, (rejection,))
        with pytest.raises(DataError) as caught:
            count_pack(LoaderCounters(), 0, (rejection,), failing=set(Reason))
        assert_short([*lines, str(caught.value)])
    report = Report("set", tmp_path)
    report.add(RecordChecker(tmp_path, 100, encoder)(value))
    assert_short(report.table().splitlines())


def test_errors_keep_their_beginning_and_end() -> None:
    error = DataError("data set 'x' " + "y" * 10_000 + "; do this")
    assert len(str(error)) == MAX_MESSAGE
    assert str(error).startswith("data set 'x' y")
    assert str(error).endswith("y; do this")
    assert "(10022 characters)" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(UserError("short")) == "short"


@given(st.text(max_size=300), st.integers(40, 200))
def test_shortened_texts_fit(text: str, limit: int) -> None:
    short = shortened(text, limit)
    assert len(short) <= limit
    assert short == text or (short[0] == text[0] and short[-1] == text[-1])
    assert len(quoted(text, limit)) <= limit + 2
