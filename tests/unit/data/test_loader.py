"""The loader end to end: order, resume, bad samples, and errors before anything starts."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dattn.batch import PackedBatch
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.loader import VLMLoader
from megatron_dattn.data.loader_state import dump_state, load_state
from megatron_dattn.data.rejection import Reason
from megatron_dattn.errors import CheckpointError, ConfigError, DataError
from tests.unit.data.builders import (
    data_config,
    make_dataset,
    make_loader,
    make_records,
    model_sizes,
    record,
    save_image,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetConfig:
    """50 good samples."""
    folder = tmp_path_factory.mktemp("dataset")
    return make_dataset(folder, make_records(folder, 50))


def take(loader: VLMLoader, count: int) -> list[PackedBatch]:
    return list(itertools.islice(iter(loader), count))


def keys(batches: list[PackedBatch]) -> list[list[str]]:
    return [batch.sample_keys for batch in batches]


def assert_equal(left: list[PackedBatch], right: list[PackedBatch]) -> None:
    assert keys(left) == keys(right)
    for one, other in zip(left, right, strict=True):
        assert one.layout == other.layout
        for name in ("input_ids", "labels", "pixel_values"):
            assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_continues_with_the_next_batch(
    processor: Path, dataset: DatasetConfig, num_workers: int
) -> None:
    config = data_config(processor, num_workers=num_workers)
    whole = make_loader(config, [dataset])
    first = take(whole, 7)
    state, counters = whole.save_state(), whole.counters()
    after = take(whole, 12)  # beyond an epoch of 50 samples
    resumed = make_loader(config, [dataset])
    resumed.restore_state(state)
    assert resumed.counters() == counters
    assert_equal(take(resumed, 6), after[:6])
    # Once more, from a loader that was itself resumed.
    again = make_loader(config, [dataset])
    again.restore_state(resumed.save_state())
    assert_equal(take(again, 6), after[6:])
    assert again.counters() == whole.counters()
    assert counters.seen == sum(batch.num_samples for batch in first)


def test_a_state_saved_before_the_first_batch_restores(
    processor: Path, dataset: DatasetConfig
) -> None:
    for num_workers in (0, 2):
        config = data_config(processor, num_workers=num_workers)
        loader = make_loader(config, [dataset])
        state = loader.save_state()
        resumed = make_loader(config, [dataset])
        resumed.restore_state(state)
        assert_equal(take(resumed, 3), take(loader, 3))


def test_bad_samples_are_counted_once_across_a_resume(processor: Path, tmp_path: Path) -> None:
    records = make_records(tmp_path, 60)
    for index in range(0, 60, 6):
        records[index] = record("<image>", "x", "missing.png")
    config = data_config(processor, max_skipped_fraction=0.5)
    dataset = make_dataset(tmp_path, records)
    whole = make_loader(config, [dataset])
    take(whole, 4)
    resumed = make_loader(config, [dataset])
    resumed.restore_state(whole.save_state())
    assert_equal(take(resumed, 20), take(whole, 20))
    assert resumed.counters() == whole.counters()
    assert whole.counters().skipped[Reason.MISSING_IMAGE] > 10


def test_fixed_samples_are_used_and_counted_once_across_a_resume(
    processor: Path, tmp_path: Path
) -> None:
    records = make_records(tmp_path, 60)
    for index in range(0, 60, 6):
        records[index]["conversations"] += record("why ?", "")["conversations"]
    config = data_config(processor, policies={"empty_answer": "fix"}, num_workers=2)
    dataset = make_dataset(tmp_path, records)
    whole = make_loader(config, [dataset])
    take(whole, 4)
    resumed = make_loader(config, [dataset])
    resumed.restore_state(whole.save_state())
    assert_equal(take(resumed, 20), take(whole, 20))
    counters = whole.counters()
    assert resumed.counters() == counters
    assert counters.skipped == {}
    assert counters.fixed["empty_answer"] > 10
    skipping = make_loader(data_config(processor, num_workers=2), [dataset])
    with pytest.raises(CheckpointError, match=r"data\.policies that fix or do not fix"):
        skipping.restore_state(whole.save_state())


def test_a_state_from_before_there_were_policies_restores(
    processor: Path, dataset: DatasetConfig
) -> None:
    config = data_config(processor, policies={"missing_image": "fail"})
    whole = make_loader(config, [dataset])
    take(whole, 3)
    state = load_state(whole.save_state())
    del state["counters"]["fixed"]
    del state["identity"]["data.policies that fix or do not fix"]
    resumed = make_loader(config, [dataset])
    resumed.restore_state(dump_state(state))
    assert_equal(take(resumed, 5), take(whole, 5))


def test_rejected_samples_are_counted_beside_their_neighbours(
    processor: Path, tmp_path: Path
) -> None:
    """Not those of a whole buffer before its first pack: the first step of many loaders has one."""
    records = make_records(tmp_path, 64)
    for index in range(0, 64, 4):
        records[index] = record("<image>", "x", "missing.png")
    config = data_config(processor, packing_buffer_size=32)
    loader = make_loader(config, [make_dataset(tmp_path, records)], training=False)
    for _ in loader:
        counters = loader.counters()
        assert abs(counters.num_skipped - counters.seen / 4) <= 2


def test_samples_that_were_repaired_after_the_state_was_saved_fit(
    processor: Path, tmp_path: Path
) -> None:
    """A state remembers planned packs; samples that were unusable then must not overfill them."""
    records = make_records(tmp_path, 60)
    for index in range(0, 60, 3):
        records[index] = record("<image>", "x", f"later/{index}.png")
    config = data_config(processor, max_skipped_fraction=0.5)
    dataset = make_dataset(tmp_path, records)
    states = []
    loader = make_loader(config, [dataset])
    for batch, _ in zip(loader, range(8), strict=False):
        assert batch.num_samples <= 4
        states.append(loader.save_state())
    for index in range(0, 60, 3):
        save_image(tmp_path / "later" / f"{index}.png", seed=index)
    for state in states:
        resumed = make_loader(config, [dataset])
        resumed.restore_state(state)
        assert max(batch.num_samples for batch in take(resumed, 12)) <= 4


def test_training_is_shuffled_and_depends_on_the_seed(
    processor: Path, dataset: DatasetConfig
) -> None:
    config = data_config(processor)
    first = take(make_loader(config, [dataset]), 5)
    assert_equal(first, take(make_loader(config, [dataset]), 5))
    assert keys(first) != keys(take(make_loader(config, [dataset], seed=6), 5))
    flat = [key for batch in keys(first) for key in batch]
    assert flat != sorted(flat)


@pytest.mark.parametrize(("training", "num_workers"), [(True, 0), (True, 2), (False, 0)])
def test_data_parallel_ranks_share_the_samples(
    processor: Path, dataset: DatasetConfig, num_workers: int, training: bool
) -> None:
    config = data_config(processor, num_workers=num_workers)
    seen: list[set[str]] = []
    for rank in range(2):
        loader = make_loader(
            config, [dataset], training=training, data_parallel_rank=rank, data_parallel_size=2
        )
        # Training deals an epoch's samples anew to the ranks; 4 packs are less than an epoch.
        batches = take(loader, 4 if training else 40)
        seen.append({key for batch in batches for key in batch.sample_keys})
    assert not seen[0] & seen[1]
    assert training or len(seen[0] | seen[1]) == 50


def test_validation_gives_each_sample_once_and_starts_anew(
    processor: Path, dataset: DatasetConfig
) -> None:
    loader = make_loader(data_config(processor, num_workers=2), [dataset], training=False)
    take(loader, 2)
    batches = list(loader)
    flat = [key for batch in keys(batches) for key in batch]
    assert flat == [f"set-{index:09d}" for index in range(50)]
    assert_equal(batches, list(loader))
    assert loader.counters().seen == 50
    with pytest.raises(RuntimeError, match="validation"):
        loader.save_state()


def test_packs_hold_what_the_budgets_allow(processor: Path, dataset: DatasetConfig) -> None:
    batches = take(make_loader(data_config(processor), [dataset]), 30)
    for batch in batches:
        assert batch.layout.visual_budget == 16
        assert batch.layout.text_budget == len(batch.input_ids) == len(batch.labels) == 256
        assert batch.pixel_values.shape == (len(batch.layout.images), 3, 16, 16)
        assert 1 <= batch.num_samples <= 4
        assert (batch.labels != -100).any()
    # 4 samples and 4 images are the limits; about a third of the records could waste some.
    assert sum(batch.num_samples for batch in batches) > 3.3 * len(batches)


def bad_records(folder: Path) -> dict[Reason, dict[str, Any]]:
    """One record for each way of going wrong."""
    save_image(folder / "images" / "good.png", seed=1)
    (folder / "images" / "cut.png").write_bytes((folder / "images" / "good.png").read_bytes()[:300])
    good = "images/good.png"
    return {
        Reason.BAD_RECORD: {"conversations": 3},
        Reason.ODD_ROLES: {"conversations": [{"from": "tool", "value": "x"}]},
        Reason.NO_ANSWER: {"conversations": [{"from": "human", "value": "x"}]},
        Reason.EMPTY_ANSWER: record("x", " "),
        Reason.IMAGE_COUNT: record("x", "y", good),
        Reason.CONTROL_TOKEN: record("[INST] x", "y"),
        Reason.MISSING_IMAGE: record("<image>", "y", "images/none.png"),
        Reason.BROKEN_IMAGE: record("<image>", "y", "images/cut.png"),
        Reason.TOO_MUCH_TEXT: record("x", "a red square " * 400),
        Reason.TOO_MANY_IMAGES: record("<image>" * 5, "y", [good] * 5),
    }


def test_every_kind_of_bad_sample_is_skipped_and_counted(
    processor: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = make_records(tmp_path, 30)
    bad = bad_records(tmp_path)
    for position, value in enumerate(bad.values()):
        records.insert(3 * position, value)
    dataset = make_dataset(tmp_path, records)
    loader = make_loader(data_config(processor), [dataset], training=False)
    batches = list(loader)
    assert sum(batch.num_samples for batch in batches) == 30
    counters = loader.counters()
    assert counters.skipped == {str(reason): 1 for reason in bad}
    assert counters.seen == 40
    for position, reason in enumerate(bad):
        lines = [line for line in caplog.messages if f"({reason}, " in line]
        assert len(lines) == 1
        assert f"set-{3 * position:09d}" in lines[0]


def test_bad_samples_stop_the_run_where_that_is_wanted(processor: Path, tmp_path: Path) -> None:
    records = [*make_records(tmp_path, 10), record("<image>", "y", "images/none.png")]
    dataset = make_dataset(tmp_path, records)
    config = data_config(processor, bad_samples="fail", num_workers=2)
    with pytest.raises(DataError, match=r"set-000000010 .*images/none\.png") as caught:
        take(make_loader(config, [dataset]), 20)
    assert "\n" not in str(caught.value)


def test_a_problem_may_stop_the_run_while_others_are_skipped(
    processor: Path, tmp_path: Path
) -> None:
    records = [*make_records(tmp_path, 30), record("x", ""), record("<image>", "y", "none.png")]
    dataset = make_dataset(tmp_path, records)
    config = data_config(processor, policies={"missing_image": "fail"})
    loader = make_loader(config, [dataset], training=False)
    with pytest.raises(DataError, match=r"set-000000031 .*data\.policies\.missing_image=skip"):
        list(loader)
    assert loader.counters().skipped == {"empty_answer": 1}
    config = data_config(processor, bad_samples="fail", policies={"empty_answer": "skip"})
    with pytest.raises(DataError, match=r"missing_image"):
        list(make_loader(config, [dataset], training=False))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_set_without_a_usable_sample_stops_the_run(
    processor: Path, tmp_path: Path, num_workers: int
) -> None:
    """No share of them is too many at 1.0, but the search for a usable one must have an end."""
    dataset = make_dataset(tmp_path, [record("<image>", "y", f"{i}.png") for i in range(10)])
    for limit, in_a_row in ((0.1, 100), (1.0, 10_000)):
        config = data_config(processor, num_workers=num_workers, max_skipped_fraction=limit)
        with pytest.raises(
            DataError, match=rf"rank 0 met {in_a_row} samples in a row .*set-.*\(missing_image\)"
        ):
            take(make_loader(config, [dataset]), 1)


def test_long_conversations_are_cut_after_an_answer_if_wanted(
    processor: Path, tmp_path: Path
) -> None:
    save_image(tmp_path / "a.png", seed=1)
    long = record("<image>\nx", "first answer", "a.png")
    long["conversations"] += record("y", "a red square " * 400)["conversations"]
    dataset = make_dataset(tmp_path, [long, record("x", "a red square " * 400)])
    config = data_config(processor, long_samples="truncate")
    loader = make_loader(config, [dataset], training=False)
    (batch,) = list(loader)
    assert batch.sample_keys == ["set-000000000"]
    assert loader.counters().skipped == {"too_much_text": 1}


def test_lines_that_are_no_json_are_skipped(processor: Path, tmp_path: Path) -> None:
    records = [*make_records(tmp_path, 4), {"x": 1}, {"y": 1}]
    dataset = make_dataset(tmp_path, records)
    path = Path(dataset.path)
    data = path.read_bytes()
    at = data.index(b'{"x": 1}')
    # Same length, so that the index still fits.
    path.write_bytes(data[:at] + b'{"\xff": 1}' + data[at + 8 :].replace(b'{"y": 1}', b'{"y": [}'))
    loader = make_loader(data_config(processor), [dataset], training=False)
    assert sum(batch.num_samples for batch in loader) == 4
    assert loader.counters().skipped == {"bad_record": 2}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"text_budget": 128}, "data.text_budget"),
        ({"num_workers": 2}, "data.num_workers"),
        ({"template": "plain"}, "data.template"),
    ],
)
def test_a_state_of_other_settings_is_refused(
    processor: Path, dataset: DatasetConfig, change: dict[str, Any], name: str
) -> None:
    state = make_loader(data_config(processor), [dataset]).save_state()
    other = make_loader(data_config(processor, **change), [dataset])
    with pytest.raises(CheckpointError, match=name):
        other.restore_state(state)


def test_a_state_of_another_rank_or_other_data_is_refused(
    processor: Path, dataset: DatasetConfig, tmp_path: Path
) -> None:
    config = data_config(processor)
    state = make_loader(config, [dataset]).save_state()
    with pytest.raises(CheckpointError, match="data-parallel size 1, but it is 2"):
        make_loader(config, [dataset], data_parallel_size=2).restore_state(state)
    other = make_dataset(tmp_path, make_records(tmp_path, 51))
    with pytest.raises(CheckpointError, match="other data sets"):
        make_loader(config, [other]).restore_state(state)


def test_restoring_a_running_loader_is_our_mistake(processor: Path, dataset: DatasetConfig) -> None:
    loader = make_loader(data_config(processor), [dataset])
    take(loader, 1)
    with pytest.raises(RuntimeError, match="before"):
        loader.restore_state(loader.save_state())


def test_workers_do_not_hear_the_trainer_s_signals(processor: Path, dataset: DatasetConfig) -> None:
    loader = make_loader(data_config(processor, num_workers=2), [dataset])
    take(loader, 2)
    assert loader._loader is not None
    os.kill(loader._loader._iterator._workers[0].pid, signal.SIGTERM)
    assert len(take(loader, 8)) == 8


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"tokenizer": None}, ConfigError, "data.tokenizer is not set"),
        ({"tokenizer": "/nowhere"}, ConfigError, "/nowhere"),
        ({"visual_budget": 3}, ConfigError, "visual_budget 3 is smaller than one image"),
        ({"image_processor": "/nowhere"}, ConfigError, "preprocessor_config.json"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    processor: Path,
    dataset: DatasetConfig,
    settings: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    with pytest.raises(error, match=text):
        make_loader(data_config(processor, **settings), [dataset])


def test_models_that_do_not_fit_the_processor_are_refused(
    processor: Path, dataset: DatasetConfig
) -> None:
    with pytest.raises(ConfigError, match="image_size is 32"):
        make_loader(data_config(processor), [dataset], sizes=model_sizes(image_size=32))
    with pytest.raises(ConfigError, match="vocab_size is 100"):
        make_loader(data_config(processor), [dataset], sizes=model_sizes(vocab_size=100))


def test_no_data_set_is_refused(processor: Path) -> None:
    with pytest.raises(ConfigError, match="names no data set"):
        make_loader(data_config(processor), [])


def test_unprepared_and_changed_data_sets_are_refused(processor: Path, tmp_path: Path) -> None:
    config = data_config(processor)
    dataset = make_dataset(tmp_path, make_records(tmp_path, 5))

    def refused(changed: DatasetConfig, text: str) -> None:
        with pytest.raises(DataError, match=text):
            make_loader(config, [changed])

    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps(make_records(tmp_path, 5)))
    refused(DatasetConfig(str(raw)), "tools/prepare_data.py")
    refused(DatasetConfig(str(tmp_path / "none.jsonl")), "does not exist")
    refused(DatasetConfig(dataset.path, image_root="/nowhere"), "image root")
    refused(DatasetConfig(dataset.path, weight=0.0), "weight 0, which must be positive")
    # As recipes had it while a weight was a share: the number of records.
    refused(DatasetConfig(dataset.path, weight=665298.0), "how often an epoch shows each record")
    with Path(dataset.path).open("a") as file:
        file.write("{}\n")
    refused(dataset, "was changed after its index")
    Path(f"{dataset.path}.idx").unlink()
    refused(dataset, "has no index")


_GARBAGE_GROUP = """
import gc, os
import torch.distributed as dist
from torch.utils.data import DataLoader
from megatron_dattn.data.workers import _WorkerStart

os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())

class Owner:
    def __init__(self, group):
        self.group, self.me = group, self

gc.disable()
Owner(dist.new_group([0]))
dist.destroy_process_group()
start = _WorkerStart(lambda worker_id: gc.collect())
print(len(list(DataLoader(range(4), num_workers=1, worker_init_fn=start))))
"""


def test_workers_do_not_collect_the_trainers_garbage() -> None:
    """An inherited process group's destructor waits for threads that the worker has not."""
    finished = subprocess.run(
        [sys.executable, "-c", _GARBAGE_GROUP], capture_output=True, text=True, timeout=60
    )
    assert finished.stdout.split()[-1:] == ["4"], finished.stderr  # older torch prints more before
