"""The folder of a run: kept from other runs, with what lies beside its checkpoints.

With its resolved configuration and its tokenizer, the folder is all that a later stage, an export
or a generation needs, wherever it is moved.
"""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_dattn.checkpoint.discovery import steps_of
from megatron_dattn.checkpoint.files import replace_synced
from megatron_dattn.config.cli import render_config
from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.data.config import DataConfig
from megatron_dattn.data.image_settings import PROCESSOR_FILES
from megatron_dattn.errors import CheckpointError
from megatron_dattn.runtime.lost_ranks import LostRankError
from megatron_dattn.runtime.rank_errors import on_first_rank
from megatron_dattn.training.exit_reason import FILE_NAME, clear_exit_reason, ending_of, record_exit
from megatron_dattn.training.run_lock import RunLock
from megatron_dattn.yaml_files import CONFIG_DIR

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
TOKENIZER_FOLDER = "tokenizer"
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "vocab*",
    "merges.txt",
)


def describe_run(config: PretrainConfig, folder: Path) -> None:
    """Write configuration and tokenizer into a run folder; call it on one rank.

    A former run's exit_reason.json is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear_exit_reason(folder)
    _copy_tokenizer(config.data, folder / TOKENIZER_FOLDER)
    copied = f"{CONFIG_DIR}/{TOKENIZER_FOLDER}"
    data = dataclasses.replace(
        config.data,
        tokenizer=copied,
        image_processor=config.data.image_processor and copied,
    )
    described = dataclasses.replace(config, data=data)
    replace_synced(folder / CONFIG_FILE, render_config(described).encode())


def describe_again(config: PretrainConfig, folder: Path) -> None:
    """Describe a run that is at work once more if its folder was deleted; call it on one rank.

    Raises:
        CheckpointError: something else has taken its place.
    """
    if (folder / CONFIG_FILE).exists():
        return
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(
            f"{folder} was replaced under this run by something that is no folder; move it away, "
            "and put the run folder back if it still exists"
        )
    lost = "" if steps_of(folder) else "; the checkpoints that were in it are gone"
    logger.warning(
        "%s was deleted under this run: configuration and tokenizer are written again%s",
        folder / CONFIG_FILE,
        lost,
    )
    describe_run(config, folder)
    tokenizer = folder / TOKENIZER_FOLDER / "tokenizer.json"
    if not tokenizer.exists():
        logger.warning("%s cannot be written again: it came from the same folder", tokenizer)


def _copy_tokenizer(config: DataConfig, target: Path) -> None:
    assert config.tokenizer is not None, "tokenizer_sha256 comes first"
    source = Path(config.tokenizer)
    if target.exists() and target.samefile(source):
        return
    target.mkdir(exist_ok=True)
    for pattern in _TOKENIZER_FILES:
        for path in filter(Path.is_file, source.glob(pattern)):
            shutil.copyfile(path, target / path.name)
    for name in PROCESSOR_FILES:
        processor = Path(config.image_processor or source) / name
        if processor.is_file():
            shutil.copyfile(processor, target / name)


@contextlib.contextmanager
def own_run_folder(folder: str | None) -> Iterator[None]:
    """Keep other runs out of the save folder, if there is one. Collective.

    Raises:
        UserError: on all ranks: another run is at work there.
    """
    locks: list[RunLock] = []

    def take(folder: str) -> None:
        locks.append(RunLock.acquire(folder))
        # A former run's note must not outlive a sudden end of this one.
        clear_exit_reason(folder)

    try:
        if folder is not None:
            on_first_rank(f"writing into {folder}", lambda: take(folder))
        yield
    except LostRankError as error:
        # Rank 0, frozen, may still hold the lock: afterwards its folder would look like another's.
        if folder is not None and not locks and not (Path(folder) / FILE_NAME).exists():
            record_exit(folder, ending_of(error))
        raise
    finally:
        for lock in locks:
            lock.release()
