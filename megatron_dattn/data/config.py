"""Where the samples come from and how they become packs."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_dattn.data.policies import Policies, Policy
from megatron_dattn.data.templates import TemplateName
from megatron_dattn.errors import ConfigError


@dataclass(frozen=True)
class DatasetConfig:
    """One prepared data set with its own image root."""

    path: str
    """A .jsonl file in LLaVA format or the folder of an Energon WebDataset, as
    tools/prepare_data.py makes them."""
    image_root: str | None = None
    """Images are looked up below this folder; the file's own folder where None. Shards bring their
    images along."""
    weight: float = 1.0
    """How often an epoch shows each record. A set's share of the training is its records times its
    weight: without weights, every record of every set is shown once per epoch."""
    split: str = "train"
    """Which part of an Energon WebDataset, by the names of its split.yaml; what
    tools/prepare_data.py writes has all of its records in `train`."""


@dataclass(frozen=True)
class DataConfig:
    """The loader: data sets, template, token budgets, tolerance for bad samples."""

    train: list[DatasetConfig] = field(default_factory=list)
    """Data sets of the training, each with path, image_root, weight and split."""
    validation: list[DatasetConfig] = field(default_factory=list)
    """Data sets of the validation, which shows every record once."""
    tokenizer: str | None = None
    """Folder with the Hugging Face tokenizer (and the image processor's preprocessor_config)."""
    image_processor: str | None = None
    """Folder with preprocessor_config.json; the tokenizer's folder where None."""
    template: TemplateName = "mistral_v3"
    """How conversations are written down: by one of megatron_dattn/data/templates, or by the chat
    template that came with the tokenizer (`model`)."""
    visual_budget: int = 5832
    """Visual tokens of one pack, padding included."""
    text_budget: int = 4096
    """Text tokens of one pack, padding included. A text of more characters than so many of the
    vocabulary's longest tokens have is refused (or cut) before it is tokenised."""
    packing_buffer_size: int = 64
    """Samples looked at together when packs are filled."""
    shuffle_buffer_size: int | None = None
    """Without effect, and reported where it is set: an epoch is shuffled as a whole."""
    num_workers: int = 2
    """Loader processes per data-parallel rank; 0 loads in the training process."""
    worker_timeout_seconds: float | None = 300.0
    """Stop when a loader process that is waited for has sent nothing for so long: it is frozen, or
    its file system hangs. Shorter than parallel.distributed_timeout_minutes, after which the other
    ranks give up without knowing why. 0 or null waits for ever."""
    bad_samples: Literal["skip", "fail"] = "skip"
    """What to do with a sample that cannot be used: skip, count and report it, or stop."""
    policies: dict[str, Policy] = field(default_factory=dict)
    """What to do about single kinds of problems (`{missing_image: fail, empty_answer: fix}`): stop,
    skip the sample, or fix it where that is defined. The others are fixed, or left to bad_samples,
    as the table in docs/data.md says."""
    max_skipped_fraction: float = 0.1
    """Stop when more than this share of the data cannot be used. Judged on the samples of all
    ranks, those since the stage began and the most recent ones, with a margin for chance: see
    megatron_dattn/data/skipped_samples.py."""
    max_image_pixels: int = 40_000_000
    """The largest image that is decoded, width times height; no side may have more than 16384
    pixels. What else makes much work is refused too: see megatron_dattn/data/image_structure.py."""
    long_samples: Literal["skip", "truncate"] = "skip"
    """A conversation beyond a budget is skipped and counted, or cut after the last answer up to
    which it fits."""
    image_fit: Literal["resize", "pad", "crop", "anyres"] | None = None
    """Stretch images to the square, pad them with the mean colour first (LLaVA-1.5's training), cut
    out their middle, or stretch them and add tiles of the encoder's size (LLaVA-NeXT). None: what
    the image processor does (SigLIP's stretches, CLIP's cuts)."""
    image_grid_pinpoints: list[list[int]] | None = None
    """Height and width in pixels of the resolutions that `anyres` chooses from, whole tiles each.
    None: LLaVA-NeXT's, 1x2, 2x1, 2x2, 3x1 and 1x3 tiles."""
    max_images_per_sample: int | None = None
    """A sample with more images is treated as one beyond a budget: see long_samples."""
    video_frames: int = 8
    """Frames that are taken of a video, evenly from its first to its last; all of a shorter one."""

    def __post_init__(self) -> None:
        for name in ("visual_budget", "text_budget", "packing_buffer_size", "video_frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be positive, got {getattr(self, name)}")
        if self.image_grid_pinpoints is not None and self.image_fit != "anyres":
            raise ConfigError(
                "data.image_grid_pinpoints is for data.image_fit 'anyres', which is "
                f"{self.image_fit!r}; set it, or leave the resolutions out"
            )
        if self.max_images_per_sample is not None and self.max_images_per_sample < 0:
            raise ConfigError(
                "data.max_images_per_sample must not be negative, got "
                f"{self.max_images_per_sample}; null sets no limit"
            )
        if self.num_workers < 0:
            raise ConfigError(f"data.num_workers must not be negative, got {self.num_workers}")
        if (self.worker_timeout_seconds or 0.0) < 0.0:
            raise ConfigError(
                "data.worker_timeout_seconds must not be negative, got "
                f"{self.worker_timeout_seconds}; 0 waits for ever"
            )
        if not 0.0 <= self.max_skipped_fraction <= 1.0:
            raise ConfigError(
                f"data.max_skipped_fraction must lie in [0, 1], got {self.max_skipped_fraction}"
            )
        _ = self.resolved_policies  # refuses what is no policy

    @property
    def resolved_policies(self) -> Policies:
        """The policies with those that follow from other settings."""
        return Policies.of(
            self.policies or {},  # a file may leave the place behind its name empty
            bad_samples=self.bad_samples,
            long_samples=self.long_samples,
        )
