"""The record, the mixture and the commands of docs/data.md work as they are typed."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dattn.config.cli import load_config
from megatron_dattn.data.conversation import parse_record
from tests.unit.data.builders import record, save_image, save_processor
from tools import check_data, prepare_data

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
# The paper's three stages are in tests/functional/test_documented_commands.py.
COMMANDS = PAGE.partition("### The paper's three stages")[0]
TOOLS: dict[str, Callable[[list[str]], int]] = {
    "tools/check_data.py": check_data.main,
    "tools/prepare_data.py": prepare_data.main,
}


def block(kind: str) -> str:
    """The page's first code block of a kind."""
    found = re.search(rf"^```{kind}\n(.*?)^```", PAGE, re.M | re.S)
    assert found is not None
    return found[1]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the page's commands name."""
    monkeypatch.chdir(tmp_path)
    save_processor(tmp_path / "checkpoints" / "import" / "tokenizer")
    save_image(tmp_path / "data" / "images" / "1.png", seed=1)
    records = [record("<image>\nwhat is it ?", f"number {index}", "1.png") for index in range(4)]
    for name in ("llava", "held_out"):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(records))
    (tmp_path / "data" / "text.json").write_text(json.dumps([record("what ?", "a text")] * 4))
    (tmp_path / "data" / "mixture.yaml").write_text(block("yaml"))
    image = {"bytes": (tmp_path / "data" / "images" / "1.png").read_bytes(), "path": "1.png"}
    turns = {"texts": [{"user": "what is it ?", "assistant": "a square", "source": "vqa"}]}
    for name, row in (
        ("onevision", {"image": image, "conversations": records[0]["conversations"]}),
        ("cauldron", {"images": [image], **turns}),
    ):
        (tmp_path / "data" / name).mkdir()
        table = pa.Table.from_pylist([row])
        pq.write_table(table, tmp_path / "data" / name / "train-00000-of-00001.parquet")
    return tmp_path


def test_the_record_is_one() -> None:
    conversation = parse_record(json.loads(block("json")))
    assert conversation.images == ("coco/train2017/000000123.jpg",)
    assert conversation.answers == ("A cat on a sofa.",)


def test_the_commands(project: Path) -> None:
    lines = re.findall(r"^python (tools/.+)$", COMMANDS.replace("\\\n", " "), re.M)
    assert len(lines) == 8
    for line in lines:
        tool, *arguments = shlex.split(line)
        assert TOOLS[tool](arguments) == 0, line
    mixed = load_config("data/mixed/train.yaml").data.train
    weights = {Path(data.path).stem: data.weight for data in mixed}
    assert weights == {"llava": 1.0, "text": 0.5}
    assert load_config("data/validation/validation.yaml").data.validation
    assert (project / "report.json").is_file()
    for folder in ("shards", "shards_onevision", "lines"):
        assert len(load_config(f"data/{folder}/train.yaml").data.train) == 1
    assert (project / "data" / "shards" / "llava" / "shard_00000.tar").is_file()
