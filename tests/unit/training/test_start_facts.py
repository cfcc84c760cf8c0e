"""Facts of a start: they change with all that shapes the run, and not with where files lie."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_dattn.config.cli import parse_command_line
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.training import start_facts as module
from megatron_dattn.training.start_facts import start_facts
from tests.functional.workspace import Workspace, make_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def config_of(workspace: Workspace, *flags: str) -> PretrainConfig:
    return parse_command_line([*workspace.flags(), *flags]).config


def changed(ours: dict[str, Any], theirs: dict[str, Any]) -> set[str]:
    names = ours.keys() | theirs.keys()
    return {name for name in names if ours.get(name, "-") != theirs.get(name, "-")}


def test_every_setting_is_a_fact_or_declared_to_differ(workspace: Workspace) -> None:
    config = config_of(workspace)
    leaves = {name for name, _ in module._flatten(dataclasses.asdict(config))}
    left_out = leaves - start_facts(config).keys()
    assert {module._pattern(name) for name in left_out} == set(module.MAY_DIFFER)


def test_facts_are_plain_json(workspace: Workspace) -> None:
    facts = start_facts(config_of(workspace))
    assert json.loads(json.dumps(facts)).keys() == facts.keys()


def test_the_same_files_elsewhere_are_the_same_facts(workspace: Workspace, tmp_path: Path) -> None:
    shutil.copytree(workspace.folder / "data", tmp_path / "data")
    shutil.copytree(workspace.folder / "tokenizer", tmp_path / "tokenizer")
    config = config_of(workspace)
    moved = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            tokenizer=str(tmp_path / "tokenizer"),
            train=[
                dataclasses.replace(dataset, path=str(tmp_path / "data" / Path(dataset.path).name))
                for dataset in config.data.train
            ],
        ),
    )
    assert changed(start_facts(config), start_facts(moved)) == set()


@pytest.mark.parametrize("name", ["data/train.jsonl", "tokenizer/tokenizer.json"])
def test_other_content_in_the_same_place_is_noticed(
    workspace: Workspace, tmp_path: Path, name: str
) -> None:
    """A record changed without changing its length, a tokenizer with one other byte."""
    copy = shutil.copytree(workspace.folder, tmp_path / "copy")
    for path in (copy / "config.yaml",):
        path.write_text(path.read_text().replace(str(workspace.folder), str(copy)))
    other = Workspace(copy, copy / "config.yaml")
    before = start_facts(config_of(other))
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    (difference,) = changed(before, start_facts(config_of(other)))
    assert difference.startswith("content of data.")


def test_a_file_that_one_host_lacks_is_a_fact_not_an_error(workspace: Workspace) -> None:
    facts = start_facts(config_of(workspace, "--data.tokenizer", "nowhere"))
    assert facts["content of data.tokenizer"] == "unreadable (No such file or directory)"


def test_a_local_change_of_the_code_changes_its_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(module._PACKAGE, tmp_path / "megatron_dattn")
    before = module.code_sha256()
    monkeypatch.setattr(module, "_PACKAGE", copy)
    module.code_sha256.cache_clear()
    try:
        assert module.code_sha256() == before
        module.code_sha256.cache_clear()
        with (copy / "attention" / "merge.py").open("a") as file:
            file.write("\n")
        assert module.code_sha256() != before
    finally:
        module.code_sha256.cache_clear()
