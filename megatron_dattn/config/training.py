"""How long, how fast, from where and to where: the training loop's own settings."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_dattn.config.written_folders import check_name, check_run_folder
from megatron_dattn.errors import ConfigError, nearest_name

COMPARED_ON_RESUME = (
    *("training.train_iters", "training.global_batch_size"),
    *("optimizer.learning_rates", "optimizer.min_lr_ratio", "optimizer.warmup_ratio"),
    *("optimizer.weight_decay", "optimizer.adam_beta1", "optimizer.adam_beta2"),
    "optimizer.adam_eps",
)
"""Settings that go on shaping the weights in a resumed run: another value is refused there unless
`checkpoint.change_on_resume` names it."""


def nearest_multiples(value: int, divisor: int) -> str:
    """The positive multiples of a divisor below and above a value that is none, for a remedy."""
    below = value - value % divisor
    return " and ".join(str(fit) for fit in (below, below + divisor) if fit > 0)


@dataclass(frozen=True)
class ModuleLearningRates:
    """Peak learning rate per module; 0.0 freezes the module (it has no optimizer state).

    What an attention preset adds to the decoder layers (gates, cross-attention, projectors) learns
    with the adapter's rate.
    """

    vision_model: float = 0.0
    """Peak rate of the encoder; 0.0 freezes it."""
    adapter: float = 1e-3
    """Peak rate of the adapter; 0.0 freezes it."""
    language_model: float = 0.0
    """Peak rate of the language model; 0.0 freezes it."""

    def __post_init__(self) -> None:
        rates = (self.vision_model, self.adapter, self.language_model)
        if min(rates) < 0:
            raise ConfigError(f"optimizer.learning_rates must not be negative, got {rates}")
        if max(rates) == 0:
            raise ConfigError("optimizer.learning_rates are all 0.0: nothing would be trained")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a cosine schedule (paper, Table 7)."""

    learning_rates: ModuleLearningRates = field(default_factory=ModuleLearningRates)
    min_lr_ratio: float = 0.0
    """The cosine ends at this share of each module's peak."""
    warmup_ratio: float = 0.03
    """Share of train_iters over which the rates rise linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms and biases have none."""
    adam_beta1: float = 0.9
    """Decay of the mean of the gradients, per step."""
    adam_beta2: float = 0.999
    """Decay of the mean of their squares, per step."""
    adam_eps: float = 1e-8
    """Added to the root of the squares' mean."""
    clip_grad: float = 1.0
    """Clip the global gradient norm to this; 0.0 does not clip."""
    max_skipped_steps: int = 10
    """Stop after this many steps in a row with a non-finite loss or gradient."""

    def __post_init__(self) -> None:
        for name in ("min_lr_ratio", "warmup_ratio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"optimizer.{name} must lie in [0, 1], got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.adam_eps <= 0:
            raise ConfigError(f"optimizer.adam_eps must be positive, got {self.adam_eps}")
        if self.max_skipped_steps < 1:
            raise ConfigError(
                f"optimizer.max_skipped_steps must be positive, got {self.max_skipped_steps}"
            )
        for name in ("weight_decay", "clip_grad"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name} must not be negative")


@dataclass(frozen=True)
class TrainingConfig:
    """One stage of training."""

    stage: str = "stage1"
    """Name of the stage; recorded in checkpoints, which resume only under the same name."""
    train_iters: int = 1000
    """Steps of this stage."""
    micro_batch_size: int = 8
    """The most samples in one pack."""
    global_batch_size: int = 256
    """Samples per step: micro_batch_size * data-parallel size * accumulated micro-batches."""
    seed: int = 1234
    """Of new weights and of the order of the samples."""
    eval_interval: int = 0
    """Validate every so many steps; 0 does not validate."""
    eval_iters: int = 10
    """Micro-batches per data-parallel rank in one validation."""

    def __post_init__(self) -> None:
        for name in ("train_iters", "micro_batch_size", "global_batch_size", "eval_iters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name} must be positive, got {getattr(self, name)}")
        if self.eval_interval < 0:
            raise ConfigError(
                f"training.eval_interval must not be negative, got {self.eval_interval}; 0 does "
                "not validate"
            )

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Packs that each data-parallel rank accumulates per step.

        Raises:
            ConfigError: the global batch is not a multiple of micro-batch * ranks.
        """
        per_pass = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % per_pass:
            raise ConfigError(
                f"training.global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size} * data-parallel size "
                f"{data_parallel_size} = {per_pass}; the nearest are "
                f"{nearest_multiples(self.global_batch_size, per_pass)}"
            )
        return self.global_batch_size // per_pass


@dataclass(frozen=True)
class CheckpointConfig:
    """Where weights come from and where they go."""

    save: str | None = None
    """Folder of this stage's checkpoints; a checkpoint already in it is resumed."""
    load: str | None = None
    """Start from the weights alone of this checkpoint folder (a conversion or earlier stage)."""
    save_interval: int = 500
    """Save every so many steps and at the end; 0 saves at the end only."""
    asynchronous: bool = True
    """Write checkpoints beside training, from a copy in host memory that is kept from save to save:
    as large as this rank's share of weights and optimizer. False: training waits for the disk, and
    nothing is copied. The last checkpoint, and that of a run that is stopped, are waited for."""
    keep_last: int = 2
    """Older checkpoints are deleted; at least the two newest verified ones always stay."""
    verify: bool = True
    """Compare sha256 sums before loading (sizes are always compared)."""
    change_on_resume: list[str] = field(default_factory=list)
    """Full names of settings that shall change where this run resumes (training.train_iters makes
    it longer, optimizer.learning_rates). What these settings are in the checkpoint would otherwise
    be required; a name that changes nothing does no harm."""

    def __post_init__(self) -> None:
        check_run_folder("checkpoint.save", self.save)
        check_name("checkpoint.load", self.load)
        for name in ("save_interval", "keep_last"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"checkpoint.{name} must not be negative, got {getattr(self, name)}"
                )
        for name in self.change_on_resume:
            if name not in COMPARED_ON_RESUME:
                by_end = [full for full in COMPARED_ON_RESUME if full.endswith(f".{name}")]
                nearest = by_end[0] if by_end else nearest_name(name, COMPARED_ON_RESUME)
                remedy = f"the nearest is {nearest}" if nearest else "leave it out"
                raise ConfigError(
                    f"checkpoint.change_on_resume names {name}, which is none of the settings that "
                    f"a resume compares ({', '.join(COMPARED_ON_RESUME)}); {remedy}"
                )


@dataclass(frozen=True)
class LoggingConfig:
    """What is written while training."""

    log_interval: int = 10
    """Write a line every so many steps."""
    tensorboard_dir: str | None = None
    """Folder of TensorBoard's event files; null writes none."""
    sample_ledger: str | None = None
    """Folder for one JSON line per step and data-parallel rank with the consumed sample keys."""
    progress_bar: Literal["auto", "on", "off"] = "auto"
    """A bar on standard error; auto shows it where that is a terminal."""
    alpha_interval: int = 0
    """Report every so many steps how much text attends to images, by layer and head; 0 never
    does."""

    def __post_init__(self) -> None:
        check_name("logging.tensorboard_dir", self.tensorboard_dir)
        check_name("logging.sample_ledger", self.sample_ledger)
        if self.log_interval < 1:
            raise ConfigError(f"logging.log_interval must be positive, got {self.log_interval}")
        if self.alpha_interval < 0:
            raise ConfigError(
                f"logging.alpha_interval must not be negative, got {self.alpha_interval}; 0 never "
                "reports"
            )
