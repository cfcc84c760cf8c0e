"""What the verbs of the training loop share: the parts of one run, built by `setup.py`."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_dattn.config.pretrain import PretrainConfig
from megatron_dattn.data.skip_limit import RecentSamples
from megatron_dattn.training.checkpoint import Checkpointer
from megatron_dattn.training.ledger import SampleLedger
from megatron_dattn.training.metrics import Metrics
from megatron_dattn.training.run_folder import describe_again
from megatron_dattn.training.state import TrainState
from megatron_dattn.training.stream import BatchStream
from megatron_dattn.training.validate import Validation


@dataclass
class Run:
    """One run of one stage on this rank."""

    config: PretrainConfig
    state: TrainState
    """Everything a checkpoint holds: weights, optimizer, schedule, loader, counters."""
    stream: BatchStream
    num_microbatches: int
    seq_length: int
    """Tokens of one pack, padding included."""
    metrics: Metrics
    checkpointer: Checkpointer | None
    """None where nothing is saved."""
    validation: Validation | None
    ledger: SampleLedger | None
    """Only on the ranks that load, if a ledger is kept."""
    recent_samples: RecentSamples = field(init=False)
    """Judges whether too many of them could not be used."""

    def __post_init__(self) -> None:
        self.recent_samples = RecentSamples(self.config.data.max_skipped_fraction)

    def describe_again(self) -> None:
        """Write configuration and tokenizer anew if the run folder was deleted."""
        if self.config.checkpoint.save is not None:
            describe_again(self.config, Path(self.config.checkpoint.save))

    def sync_ledger(self) -> None:
        """Force this rank's ledger to the disk, if it keeps one."""
        if self.ledger is not None:
            self.ledger.sync()

    def close(self) -> None:
        """Close what has open files."""
        self.metrics.close()
        if self.ledger is not None:
            self.ledger.close()
