"""Refuses files that are not plain, and JSON that breaks what comes after, each in one error."""

import json
import os
import socket
from pathlib import Path

import pytest

from megatron_dattn.errors import CheckpointError, ConfigError, UserError
from megatron_dattn.runtime.untrusted_file import (
    MAX_DEPTH,
    JsonFields,
    open_plain,
    parse_json,
    read_json_object,
    read_plain,
    show,
)


def test_a_plain_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert read_plain(tmp_path / "file", max_bytes=3) == b"abc"
    with open_plain(tmp_path / "file") as file:
        assert file.read() == b"abc"


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    # The name of a socket may have 107 bytes only.
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Path.mkdir, "a folder"),
        (make_pipe, "a named pipe"),
        (make_socket, "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
)
def test_what_is_no_plain_file_is_refused_by_kind(tmp_path: Path, make, kind: str) -> None:
    make(tmp_path / "thing")
    with pytest.raises(OSError) as error:
        read_plain(tmp_path / "thing", max_bytes=10)
    assert error.value.strerror == f"it is {kind}, not a plain file"


def test_links_are_followed_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("file")
    assert read_plain(tmp_path / "link", max_bytes=3) == b"abc"
    with pytest.raises(OSError) as error:
        read_plain(tmp_path / "link", max_bytes=3, follow_links=False)
    assert error.value.strerror == "it is a link, not a plain file"


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError) as error:
        read_plain(tmp_path / "sparse", max_bytes=1000)
    assert error.value.strerror == "it has more than the 1,000 bytes that such a file may have"


def test_a_size_that_is_told_wrong_is_noticed() -> None:
    assert os.stat("/proc/self/status").st_size == 0
    with pytest.raises(OSError, match="more than the 10 bytes"):
        read_plain("/proc/self/status", max_bytes=10)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_plain(tmp_path / "nothing")


def test_sane_json_is_what_it_says() -> None:
    text = '{"a": [1, 2.5, null, true, "\\u00e9", NaN], "limit": 1000000000000000019884624838656}'
    assert str(parse_json(text.encode())) == str(json.loads(text))
    assert parse_json(b'{"a": 1, "a": 1}') == {"a": 1}


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("\0\0\0", "Expecting value"),
        ("\ufeff{}", "BOM"),
        (nested(MAX_DEPTH + 2), "nested deeper than 64 levels"),
        (nested(100_000), "nested deeper than 64 levels"),
        ('{"a":' * 100_000, "nested deeper than 64 levels"),
        ("9" * 101, "integer of 101 digits"),
        ("-" + "9" * 5000, "integer of 5001 digits"),
        ('{"a": 1, "a": 2}', 'key "a" twice'),
        ('{"\\ud800": 1}', "half of a surrogate pair"),
        ('["\\udfff"]', "half of a surrogate pair"),
    ],
)
def test_what_is_not_sane_is_a_value_error(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text.encode())


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(ValueError, match="utf-8"):
        parse_json(b"\xff\xfe")


def test_the_depth_that_is_allowed() -> None:
    assert parse_json(nested(MAX_DEPTH).encode())


@pytest.mark.parametrize("error_class", [CheckpointError, ConfigError])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is not valid JSON"),
        (b"[]", "must hold a JSON object, found list"),
        (b"\xff", "JSON"),
    ],
)
def test_the_callers_error_names_the_file(
    tmp_path: Path, error_class: type[UserError], content: bytes, reason: str
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(error_class, match=reason) as error:
        read_json_object(path, error_class)
    assert str(error.value).startswith(str(path))


def test_a_file_that_would_be_waited_for_or_never_ends(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b" " * 101)
    for name, reason in (("pipe", "a named pipe"), ("zeros", "a device"), ("large", "100 bytes")):
        with pytest.raises(ConfigError, match=f"{name} cannot be read: it .*{reason}"):
            read_json_object(tmp_path / name, ConfigError, max_bytes=100)
    with pytest.raises(FileNotFoundError):
        read_json_object(tmp_path / "nothing", ConfigError)


VALUES = {"n": 3, "x": 0.5, "t": "a", "yes": True, "o": {}, "inf": float("inf"), "l": [1, 2.5]}


def test_values_of_the_right_type() -> None:
    fields = JsonFields(VALUES, "f.json", ConfigError)
    assert fields.whole("n", least=3) == 3
    assert fields.number("x") == 0.5
    assert fields.number("n") == 3.0
    assert fields.text("t") == "a"
    assert fields.flag("yes") is True
    assert fields.section("o") == {}
    assert fields.numbers("l", 2) == (1.0, 2.5)


@pytest.mark.parametrize(
    ("method", "name", "expected"),
    [
        ("whole", "x", "x 0.5, but it must be a whole number"),
        ("whole", "yes", "yes true, but it must be a whole number"),
        ("number", "inf", "inf Infinity, but it must be a number"),
        ("number", "yes", "yes true, but it must be a number"),
        ("number", "t", 't "a", but it must be a number'),
        ("text", "n", "n 3, but it must be a string"),
        ("flag", "n", "n 3, but it must be true or false"),
        ("section", "l", "l [1, 2.5], but it must be an object"),
        ("whole", "absent", "f.json lacks absent"),
    ],
)
def test_values_of_another_type(method: str, name: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        getattr(JsonFields(VALUES, "f.json", ConfigError), method)(name)
    assert expected in str(error.value)


def test_values_out_of_bounds() -> None:
    fields = JsonFields(VALUES, "f.json", ConfigError)
    with pytest.raises(ConfigError, match="whole number of at least 4"):
        fields.whole("n", least=4)
    for count in (1, 3):
        with pytest.raises(ConfigError, match=f"must be {count} numbers"):
            fields.numbers("l", count)


def test_long_values_are_cut() -> None:
    assert len(show("x" * 10_000)) < 100
