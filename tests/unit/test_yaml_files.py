"""Words of a YAML file are read as their field wants them, wherever YAML 1.1 would twist them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_dattn.errors import ConfigError
from megatron_dattn.yaml_files import CONFIG_DIR, parse_yaml, read_yaml


@dataclass
class Item:
    path: str
    weight: float = 1.0


@dataclass
class Form:
    text: str
    choice: Literal["auto", "on", "off"]
    switch: bool
    maybe: bool | None
    whole: int
    number: float
    either: Literal["a"] | None
    items: list[Item]
    inner: Item
    names: list[str]


def value_of(field: str, word: str) -> Any:
    return parse_yaml(f"{field}: {word}\n", Form, source="it")[field]


@pytest.mark.parametrize(
    "word",
    ["on", "off", "yes", "No", "y", "true", "1", "010", "1.10", "1e-5", "1_000", "0x1F", "1:30",
     "12:30:45", "2024-01-01", "2001-12-14 21:59:43", ".inf", ".nan", "=", "0o17", "+1"],
)  # fmt: skip
def test_text_is_what_stands_there(word: str) -> None:
    assert value_of("text", word) == word
    assert value_of("names", f"[{word}]") == [word]
    assert value_of("items", f"[{{path: {word}}}]") == [{"path": word}]
    assert value_of("inner", f"{{path: {word}}}") == {"path": word}


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_a_choice_among_words(word: str) -> None:
    assert value_of("choice", word) == word


@pytest.mark.parametrize(
    ("words", "expected"),
    [(("on", "yes", "true", "On", "YES", "True"), True), (("off", "no", "false", "OFF"), False)],
)
def test_switches_take_every_usual_word(words: tuple[str, ...], expected: bool) -> None:
    for word in words:
        assert value_of("switch", word) is expected
        assert value_of("maybe", word) is expected
        assert value_of("switch", f"'{word}'") is expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [("1e-5", 1e-5), ("1E5", 1e5), ("1e+3", 1e3), ("5", 5.0), ("5.", 5.0), (".5", 0.5),
     ("-1.5e-3", -1.5e-3), ("1_000.5", 1000.5), ("'1e-5'", 1e-5), ("010", 10.0)],
)  # fmt: skip
def test_numbers(word: str, expected: float) -> None:
    value = value_of("number", word)
    assert type(value) is float
    assert value == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [("5", 5), ("010", 10), ("1_000", 1000), ("0x1F", 31), ("0o17", 15), ("1e6", 10**6),
     ("-3", -3), ("'5'", 5), ("!!int 5", 5)],
)  # fmt: skip
def test_whole_numbers(word: str, expected: int) -> None:
    value = value_of("whole", word)
    assert type(value) is int
    assert value == expected


@pytest.mark.parametrize("word", ["null", "~", ""])
def test_nothing(word: str) -> None:
    assert value_of("either", word) is None
    assert value_of("text", "'null'") == "null"


@pytest.mark.parametrize(
    ("field", "word", "expected"),
    [
        ("whole", "1:30", "expected int"),
        ("whole", "1.5", "expected int"),
        ("whole", "1e-3", "expected int"),
        ("whole", "yes", "expected int"),
        ("number", "1:30.5", "expected float"),
        ("number", ".nan", "expected float"),
        ("number", ".inf", "expected float"),
        ("switch", "maybe", "expected bool"),
        ("switch", "1", "expected bool"),
        ("inner", "some.yaml", "expected a mapping (path, weight, ...)"),
        ("items", "some.yaml", "expected a list"),
    ],
)
def test_what_is_no_such_value_is_named_with_its_place(
    tmp_path: Path, field: str, word: str, expected: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"text: x\n{field}: {word}\n")
    with pytest.raises(ConfigError) as caught:
        read_yaml(path, Form)
    assert str(caught.value) == f"'{path}', line 2: {field}: {expected}, got '{word}'"


@pytest.mark.parametrize(
    ("word", "expected"),
    [("off", "off"), ("yes", "yes"), ("true", True), ("null", None), ("010", 10), ("1e-5", 1e-5),
     ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("1.5", 1.5), ("0x10", 16), ("'5'", "5")],
)  # fmt: skip
def test_an_unknown_field_follows_yaml_1_2(word: str, expected: Any) -> None:
    value = value_of("unknown", word)
    assert type(value) is type(expected)
    assert value == expected


def test_keys_are_words() -> None:
    assert parse_yaml("on: 1\n1: 2\n2024-01-01: 3\n", Any, source="it") == {
        "on": 1,
        "1": 2,
        "2024-01-01": 3,
    }


def test_anchors_and_merges() -> None:
    text = "base: &b {path: off, weight: 2}\nitems: [{<<: *b, weight: 1e-1}, *b]\n"
    assert parse_yaml(text, Form, source="it")["items"] == [
        {"path": "off", "weight": 0.1},
        {"path": "off", "weight": 2.0},
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2\n", "'a' stands twice"),
        ("a: !!python/name:os.system x\n", "tag"),
        ("a: !secret x\n", "tag !secret is unknown"),
        ("a: [\n", "is not YAML"),
        ("a: 1\n---\nb: 2\n", "is not YAML"),
        ("? [a, b]\n: 1\n", "a key must be one word"),
        ("<<: 3\n", "<< takes a mapping"),
        ("a: &a [*a]\n", "nested without end"),
    ],
)
def test_what_is_lost_or_unknown_is_an_error_of_one_line(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, Any, source="it")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbftext: \xc3\xa9\n")  # a byte-order mark
    assert read_yaml(path, Form) == {"text": "\u00e9"}
    path.write_text("")
    assert read_yaml(path, Form) is None
    path.write_bytes(b"text: \xe9\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(path, Form)
    with pytest.raises(ConfigError, match=r"b\.yaml' does not exist"):
        read_yaml(tmp_path / "b.yaml", Form)


def test_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"text: {CONFIG_DIR}/x\nnames: ['{CONFIG_DIR}', 'a{CONFIG_DIR}']\n")
    expected = {"text": f"{tmp_path}/x", "names": [str(tmp_path), f"a{CONFIG_DIR}"]}
    assert read_yaml(path, Form) == expected
    monkeypatch.chdir(tmp_path)
    assert read_yaml(Path("a.yaml"), Form) == expected
    with pytest.raises(ConfigError, match="in files only"):
        value_of("text", f"{CONFIG_DIR}/x")
