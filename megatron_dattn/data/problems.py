"""The table of everything that can be wrong with a record: what it is, what happens to it, what
`fix` does about it, and what a user can do.

The loader, `tools/check_data.py` and docs/data.md all read this one table. A fix is written down
here because it changes what is trained on: it must be harmless, or not be one.
"""

from dataclasses import dataclass

from megatron_dattn.data.rejection import Reason

DUPLICATE_ID = "duplicate_id"
DUPLICATE_RECORD = "duplicate_record"
DUPLICATE_IMAGE = "duplicate_image"


@dataclass(frozen=True)
class Problem:
    """One row of the table."""

    name: str
    about: str
    """What it is."""
    remedy: str
    """What to do about it in the data or the settings."""
    fix: str | None = None
    """What policy `fix` does; None where nothing harmless can be done."""
    is_fixed: bool = False
    """Whether it is fixed where no policy is set; otherwise `data.bad_samples` holds."""
    checked_only: bool = False
    """Found by `check_data.py` alone: the loader sees one record at a time, and uses it."""

    @property
    def default(self) -> str:
        """The policy where none is set, or `used`."""
        return "used" if self.checked_only else "fix" if self.is_fixed else "skip"


PROBLEMS = (
    Problem(
        Reason.BAD_RECORD,
        "no JSON object of this form, a path that is no text or an address, half a "
        "character, more than 16 MiB",
        "mend or drop the record",
    ),
    Problem(
        Reason.ODD_ROLES,
        "two turns of one role follow each other, an unknown role, a system turn that is not the "
        "first",
        "mend the turns",
        fix="other spellings of a known role are read as that role (user, assistant, model, bot, "
        "chatgpt, bard, bing, developer, in any case)",
    ),
    Problem(
        Reason.LEADING_ANSWER,
        "the conversation begins with an answer",
        "nothing need be done",
        fix="the answer is dropped (as LLaVA does)",
        is_fixed=True,
    ),
    Problem(
        Reason.NO_ANSWER,
        "no answer at all, or none to the last question",
        "drop the last question",
        fix="a last question is dropped, with its images",
    ),
    Problem(
        Reason.EMPTY_ANSWER,
        "an answer without a text",
        "drop it with its question",
        fix="it is dropped with its question, whose images go to the next question",
    ),
    Problem(
        Reason.NOT_A_CAPTION,
        "more than one exchange under `data.template: plain`",
        "take a chat template",
    ),
    Problem(
        Reason.IMAGE_COUNT,
        "fewer `<image>` or `<video>` than images or videos, some of which may be named in two "
        "ways; a message's video that is not named",
        "mend the text or the list",
        fix="one image or video without a placeholder is put in front of the first question",
    ),
    Problem(
        Reason.EXTRA_PLACEHOLDER,
        "more `<image>` or `<video>` than images or videos",
        "mend the text or the list",
        fix="placeholders behind those that have an image are removed",
    ),
    Problem(
        Reason.CONTROL_TOKEN,
        "a text spells one of the tokenizer's special tokens; `<image>` in an answer or system "
        "message",
        "take it out of the text",
    ),
    Problem(
        Reason.TEMPLATE,
        "`data.template: model`: the tokenizer's chat template refuses the conversation (a system "
        "message, for instance) or changes its texts",
        "take one of our templates, or mend the record",
    ),
    Problem(
        Reason.MISSING_IMAGE,
        "no such file, no permission, no plain file, outside the root",
        "correct `image_root`; `--drop-missing`",
    ),
    Problem(
        Reason.EMPTY_IMAGE,
        "a file without a byte, or an image of no width or height",
        "get the image again",
    ),
    Problem(
        Reason.BROKEN_IMAGE,
        "damaged, another format, too many scans or parts, too narrow a band to crop",
        "save the image anew",
    ),
    Problem(
        Reason.HUGE_IMAGE,
        "too many bytes or pixels, or too long a side",
        "save it smaller; `data.max_image_pixels`",
    ),
    Problem(
        Reason.ANIMATED_IMAGE,
        "a GIF, PNG or WEBP of several frames",
        "save the frame that is meant",
        fix="the first frame is taken",
        is_fixed=True,
    ),
    Problem(
        Reason.CMYK_IMAGE,
        "a JPEG in the colours of print",
        "nothing need be done",
        fix="converted to RGB, without its colour profile",
        is_fixed=True,
    ),
    Problem(
        Reason.SIXTEEN_BIT_IMAGE,
        "a PNG of 16 bits per channel",
        "nothing need be done",
        fix="the upper 8 bits are taken",
        is_fixed=True,
    ),
    Problem(
        Reason.BROKEN_VIDEO,
        "damaged, cut off, another container or codec, no video stream, no frame, frames of too "
        "many pixels",
        "encode the video anew, or give its frames",
    ),
    Problem(
        Reason.TOO_MUCH_TEXT,
        "more text tokens than `data.text_budget`",
        "raise it, or `data.long_samples: truncate` (a single exchange is never cut)",
        fix="by `data.long_samples: truncate`: cut after the last answer up to which it fits",
    ),
    Problem(
        Reason.TOO_MANY_IMAGES,
        "more visual tokens than `data.visual_budget`, or more images and frames than "
        "`data.max_images_per_sample`",
        "raise it, or `truncate`",
        fix="by `data.long_samples: truncate`, too",
    ),
    Problem(
        DUPLICATE_ID,
        "an earlier record of the file has the same `id`",
        "nothing need be done: ids are not used",
        checked_only=True,
    ),
    Problem(
        DUPLICATE_RECORD,
        "an earlier record of the file has the same turns and images",
        "`check_data.py --list-duplicates`, then `prepare_data.py --without`",
        checked_only=True,
    ),
    Problem(
        DUPLICATE_IMAGE,
        "an image (no video) has the bytes of one of an earlier record that has another name or "
        "came with that record",
        "nothing need be done; or `--list-duplicate-images` in the same way",
        checked_only=True,
    ),
)

LENGTH_PROBLEMS = frozenset((Reason.TOO_MUCH_TEXT, Reason.TOO_MANY_IMAGES))
"""Those whose fix has a setting of its own, `data.long_samples`."""
OF_FILES = frozenset(
    (
        Reason.MISSING_IMAGE,
        Reason.EMPTY_IMAGE,
        Reason.BROKEN_IMAGE,
        Reason.HUGE_IMAGE,
        Reason.ANIMATED_IMAGE,
        Reason.CMYK_IMAGE,
        Reason.SIXTEEN_BIT_IMAGE,
        Reason.BROKEN_VIDEO,
    )
)
"""Those of the files that a record names."""
FIXED_BY_DEFAULT = frozenset(Reason(problem.name) for problem in PROBLEMS if problem.is_fixed)


def problem_table() -> str:
    """The table of docs/data.md."""
    heads = ("problem", "what it is", "policy", "what `fix` does", "remedy")
    rows = [heads, ("---",) * len(heads)]
    for problem in PROBLEMS:
        fix = problem.fix or "there is none"
        rows.append((f"`{problem.name}`", problem.about, problem.default, fix, problem.remedy))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
