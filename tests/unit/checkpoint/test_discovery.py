"""The newest sound checkpoint is found whatever the pointer says; silence never hides a loss."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dattn.checkpoint import find_checkpoint, find_checkpoint_together, find_step, steps_of
from megatron_dattn.errors import CheckpointError
from tests.unit.checkpoint.test_manifest import DAMAGES, FILES, damage


@pytest.fixture(params=[find_checkpoint, find_checkpoint_together], ids=["alone", "together"])
def find(request: pytest.FixtureRequest) -> Callable:
    return request.param


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["truncated", "empty", "deleted", "bit at 0.5"])
def test_a_damaged_newest_is_passed_over_loudly(
    tmp_path: Path,
    save: Callable[[int], Path],
    find: Callable,
    caplog: pytest.LogCaptureFixture,
    name: str,
    kind: str,
) -> None:
    save(1)
    damage(save(2) / name, DAMAGES[kind])
    found = find(tmp_path)
    assert found.step == 1
    assert found.path == tmp_path / "step-0000001"
    (reason,) = found.passed_over
    assert name in reason
    assert name in caplog.text
    assert "GOING BACK to" in caplog.text


@pytest.mark.parametrize(
    "pointer", [None, "", "abc", "{}", "[]", '{"checkpoint": "step-0000999", "step": 999}',
                '{"checkpoint": "step-0000001", "step": 1}', "\x00\xff"]
)  # fmt: skip
def test_the_pointer_is_only_a_hint(
    tmp_path: Path, save: Callable[[int], Path], find: Callable, pointer: str | None
) -> None:
    save(1)
    save(2)
    if pointer is None:
        (tmp_path / "latest.json").unlink()
    else:
        (tmp_path / "latest.json").write_text(pointer)
    assert find(tmp_path).step == 2


def test_one_step_and_no_other(tmp_path: Path, save: Callable[[int], Path]) -> None:
    for step in (3, 10, 7):
        save(step)
    (tmp_path / "tensorboard").mkdir()
    assert steps_of(tmp_path) == [3, 7, 10]
    found = find_step(tmp_path, 7)
    assert (found.step, found.path.name) == (7, "step-0000007")
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; steps: 3, 7, 10$"):
        find_step(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; steps: none$"):
        find_step(tmp_path / "nowhere", 4)
    damage(tmp_path / "step-0000007" / FILES[0], DAMAGES["bit at 0.5"])
    with pytest.raises(CheckpointError, match=f"{FILES[0]} is damaged"):
        find_step(tmp_path, 7)


def test_steps_are_compared_as_numbers(tmp_path: Path, save: Callable, find: Callable) -> None:
    save(9_999_999)
    save(10_000_000)
    assert find(tmp_path).step == 10_000_000


def test_nothing_yet(tmp_path: Path, find: Callable) -> None:
    assert find(tmp_path / "nowhere") is None
    assert find(tmp_path) is None
    (tmp_path / "config.yaml").write_text("model: {}")
    (tmp_path / "tokenizer").mkdir()
    assert find(tmp_path) is None


def test_an_unfinished_first_save_is_mentioned(
    tmp_path: Path, find: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "step-0000001.tmp-1-0123456789ab-host").mkdir()
    assert find(tmp_path) is None
    assert "unfinished first save" in caplog.text


def test_if_no_checkpoint_is_usable_the_run_does_not_start_afresh(
    tmp_path: Path, save: Callable[[int], Path], find: Callable
) -> None:
    (save(1) / "common.pt").unlink()
    (save(2) / "manifest.json").write_text("")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is usable") as error:
        find(tmp_path)
    assert "step-0000002/manifest.json is damaged" in str(error.value)
    assert "step-0000001/common.pt is missing" in str(error.value)


def test_a_pointer_without_checkpoints_is_not_a_fresh_start(tmp_path: Path, find: Callable) -> None:
    (tmp_path / "latest.json").write_text("")
    with pytest.raises(CheckpointError, match="none is left"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("model.safetensors", "Hugging Face"),
        ("pytorch_model.bin", "Hugging Face"),
        ("latest_checkpointed_iteration.txt", "Megatron-LM"),
        ("metadata.json", "without manifest"),
    ],
)
def test_folders_of_another_kind_are_refused(
    tmp_path: Path, find: Callable, name: str, owner: str
) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match=owner):
        find(tmp_path)


def test_a_file_is_refused(tmp_path: Path, find: Callable) -> None:
    (tmp_path / "weights").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        find(tmp_path / "weights")


def test_one_checkpoint_may_be_named_itself(tmp_path: Path, save: Callable, find: Callable) -> None:
    first, _ = save(1), save(2)
    assert find(first).step == 1
    (first / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        find(first)


def test_without_sums_only_sizes_are_compared(
    tmp_path: Path, save: Callable, find: Callable
) -> None:
    damage(save(1) / "__0_0.distcp", DAMAGES["bit at 0.5"])
    assert find(tmp_path, verify=False).step == 1
    with pytest.raises(CheckpointError, match="sha256"):
        find(tmp_path)
