"""States that older versions saved: what they had not shown is shown once."""

import base64
import itertools
import json
import zlib
from pathlib import Path

import pytest

from megatron_dattn.data.loader_state import deal_states_anew, dump_state, load_state
from megatron_dattn.errors import CheckpointError
from tests.unit.data.builders import (
    data_config,
    make_dataset,
    make_loader,
    make_records,
    record,
)

# Written by the version before places: of 60 records, of which 4 lack their image. "shown" are the
# numbers of the records in the packs that were given out before the state was saved. Of the loader
# processes' states the random number generators, which nothing reads, are left out.
SAVED = json.loads((Path(__file__).parent / "energon_states.json").read_text())
MISSING = (3, 17, 31, 44)


@pytest.mark.parametrize("kind", SAVED)
def test_a_state_of_energons_goes_on(processor: Path, tmp_path: Path, kind: str) -> None:
    records = make_records(tmp_path, 60)
    for index in MISSING:
        records[index] = record("<image>", "x", "missing.png")
    dataset = make_dataset(tmp_path, records)
    num_workers = int(kind[0])
    config = data_config(processor, num_workers=num_workers, max_skipped_fraction=0.9)
    loader = make_loader(config, [dataset])
    state = load_state(zlib.decompress(base64.b64decode(SAVED[kind]["state"])))
    loader.restore_state(dump_state(state))
    shown = list(SAVED[kind]["shown"])
    assert loader.counters().seen >= len(shown)
    for batch in itertools.islice(iter(loader), 30):
        shown += [int(key[-9:]) for key in batch.sample_keys]
    usable = [number for number in range(60) if number not in MISSING]
    if num_workers == 0:
        assert sorted(shown[: len(usable)]) == usable
    # Two processes come to the end of an epoch at different times; each shows its half.
    assert set(shown) == set(usable)
    first_seen = {number: shown.index(number) for number in usable}
    assert max(first_seen.values()) < len(usable) + 16
    with pytest.raises(CheckpointError, match="resume once with those of the checkpoint"):
        deal_states_anew([dump_state(state)], 2, num_workers)
