"""Why a sample is not used.

Real data sets hold missing images, empty answers and records that do not fit. Such a sample is
never dropped in silence: it is rejected with one of these reasons, which are what the loader counts
(skipped_samples.py) and what `tools/check_data.py` tabulates.
"""

from dataclasses import dataclass
from enum import StrEnum

from megatron_dattn.errors import DataError, shortened

MAX_MESSAGE = 300  # characters: a rejection is one line of a log or of a table


class Reason(StrEnum):
    """The kinds of problems that a sample can have; problems.py says what each is and what can be
    done. Checkpoints count by these names, so they stay as they are."""

    BAD_RECORD = "bad_record"
    ODD_ROLES = "odd_roles"
    LEADING_ANSWER = "leading_answer"
    NO_ANSWER = "no_answer"
    EMPTY_ANSWER = "empty_answer"
    NOT_A_CAPTION = "not_a_caption"
    IMAGE_COUNT = "image_count"
    EXTRA_PLACEHOLDER = "extra_placeholder"
    CONTROL_TOKEN = "control_token"
    TEMPLATE = "template"
    MISSING_IMAGE = "missing_image"
    EMPTY_IMAGE = "empty_image"
    BROKEN_IMAGE = "broken_image"
    HUGE_IMAGE = "huge_image"
    ANIMATED_IMAGE = "animated_image"
    CMYK_IMAGE = "cmyk_image"
    SIXTEEN_BIT_IMAGE = "sixteen_bit_image"
    BROKEN_VIDEO = "broken_video"
    TOO_MUCH_TEXT = "too_much_text"
    TOO_MANY_IMAGES = "too_many_images"


class SampleError(DataError):
    """One sample that cannot be used, and why: in one line, whatever the sample holds."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(shortened(" ".join(message.split()), MAX_MESSAGE))
        self.reason = reason

    def __reduce__(self) -> tuple[type["SampleError"], tuple[Reason, str]]:
        """What a copy is made of, in another process for instance: exceptions keep one argument."""
        return type(self), (self.reason, str(self))


@dataclass(frozen=True)
class Rejection:
    """What is remembered of a rejected sample."""

    key: str
    reason: Reason
    message: str
