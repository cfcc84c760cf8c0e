"""Whatever happens to a run folder: the newest sound checkpoint or one error, and nothing is lost.

Each seed damages a folder of three checkpoints in one to three ways, then does what a run does:
find, load, save the next step, delete old ones, find again. What must come out is decided from the
files' bytes by `sound_steps`.
"""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch

from megatron_dattn.checkpoint import (
    find_checkpoint,
    find_checkpoint_together,
    find_step,
    load_checkpoint,
    prune,
    steps_of,
)
from megatron_dattn.checkpoint.tensors import open_tensors
from megatron_dattn.errors import CheckpointError
from tests.support.mutations import HARMLESS, KINDS, Contents, contents, mutate, sound_steps
from tests.support.time_limit import Hang, time_limit
from tests.unit.checkpoint.conftest import small_state

STEPS = (1, 2, 3)
SHORT, LONG = 25, 300
# A hundred times what it takes; the machine may have other things to do.
LIMIT = 60.0
# An error lists every checkpoint of a folder; each takes a path and a sentence.
MAX_MESSAGE = 500 * (len(STEPS) + 2)

Save = Callable[[int], Path]
Fill = Callable[..., None]


def check_content(path: Path, step: int) -> None:
    """Every tensor and every number of a checkpoint is of its step."""
    state = small_state(-1.0)
    loaded = load_checkpoint(path, state)
    for tensor in loaded["model"].values():
        assert torch.equal(tensor, torch.full_like(tensor, float(step)))
    assert loaded["schedule"] == {"num_steps": step}
    assert open_tensors(path)["body.bias"].load().tolist() == [float(step)] * 4


def check_single_steps(folder: Path, sound: list[int]) -> None:
    """A step that is asked for is itself or an error."""
    steps_of(folder)
    for step in (0, *STEPS, 5, 99):
        try:
            found = find_step(folder, step)
        except CheckpointError:
            assert step not in sound
        else:
            assert step in sound
            assert found.step == step


def check_going_on(folder: Path, step: int, save: Save, before: Contents) -> None:
    """The next step is saved; what is deleted is old and surely what its name says."""
    last = step + 1
    now = {**before, **contents_of(save(last), last)}
    sound, entries = sound_steps(folder, now), set(folder.iterdir())
    assert last in sound
    deleted = prune(folder, 2, newest=last)
    assert entries - set(folder.iterdir()) == set(deleted)
    kept = sorted(s for s in sound if s <= last)[-2:]
    assert set(kept) <= set(sound_steps(folder, now))
    assert {path.name for path in deleted} <= {f"step-{s:07d}" for s in now if s not in kept}
    found = find_checkpoint(folder)
    assert found is not None
    assert found.step == last
    check_content(found.path, last)


def contents_of(path: Path, step: int) -> Contents:
    return {step: contents(path.parent, (step,))[step]}


def check_after_damage(folder: Path, before: Contents, save: Save, find: Callable) -> None:
    sound = sound_steps(folder, before)
    if not sound:
        with pytest.raises(CheckpointError) as error:
            find(folder)
        assert len(str(error.value)) < MAX_MESSAGE
        return
    found = find(folder)
    assert found is not None, "a fresh start, with checkpoints in the folder"
    assert found.step == max(sound)
    assert found.path == folder / f"step-{found.step:07d}"
    check_content(found.path, found.step)
    check_single_steps(folder, sound)
    check_going_on(folder, found.step, save, before)


def check_seed(
    seed: int, folder: Path, save: Save, fill: Fill, caplog: pytest.LogCaptureFixture
) -> None:
    fill(*STEPS)
    before = contents(folder, STEPS)
    random = Random(seed)
    with time_limit(LIMIT):
        kinds = mutate(folder, random)
    print(f"seed {seed}: {kinds}")  # shown if it fails
    find = random.choice((find_checkpoint, find_checkpoint_together))
    with time_limit(LIMIT), caplog.at_level(logging.WARNING):
        check_after_damage(folder, before, save, find)
    assert not [record.message for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("seed", range(SHORT))
def test_random_damage(
    seed: int, tmp_path: Path, save: Save, fill: Fill, caplog: pytest.LogCaptureFixture
) -> None:
    check_seed(seed, tmp_path, save, fill, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SHORT, LONG))
def test_more_random_damage(
    seed: int, tmp_path: Path, save: Save, fill: Fill, caplog: pytest.LogCaptureFixture
) -> None:
    check_seed(seed, tmp_path, save, fill, caplog)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_does_what_it_is_called(kind: Callable, tmp_path: Path, fill: Fill) -> None:
    fill(*STEPS)
    before = contents(tmp_path, STEPS)
    seeds = (Random(seed) for seed in range(20))
    damaged = any(is_damaged_by(kind, tmp_path, before, random) for random in seeds)
    assert damaged == (kind not in HARMLESS)


def is_damaged_by(kind: Callable, folder: Path, before: Contents, random: Random) -> bool:
    """Whether a copy of the folder holds fewer sound checkpoints afterwards."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = shutil.copytree(folder, Path(scratch) / "run")
        with contextlib.suppress(OSError):
            kind(copy, random)
        return sound_steps(copy, before) != list(STEPS)


def test_a_hang_is_ended() -> None:
    reader, writer = os.pipe()
    with pytest.raises(Hang), time_limit(0.05):
        os.read(reader, 1)
    os.close(reader)
    os.close(writer)
