"""What is wrong with a data set, found before training: the rules of the loader, without Energon.

Every problem of every record is counted by the loader's own reasons. Without a tokenizer the text
is not measured.
"""

import multiprocessing
import signal
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dattn.data.conversation import Conversation, image_paths, parse_record
from megatron_dattn.data.encoder import SampleEncoder
from megatron_dattn.data.image_decoding import decode_image
from megatron_dattn.data.image_files import ImageRoot, images_of, read_image_file
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.json_lines import as_line, require_line_length
from megatron_dattn.data.rejection import Reason, Rejection, SampleError
from megatron_dattn.data.squares import read_squares
from megatron_dattn.data.system_errors import out_of_memory
from megatron_dattn.data.videos import Video
from megatron_dattn.errors import DataError, quoted
from megatron_dattn.runtime.log import quiet_libraries

MAX_EXAMPLES = 10  # per reason

_OF_FILES = (Reason.MISSING_IMAGE, Reason.BROKEN_IMAGE, Reason.BROKEN_VIDEO)
_RECORDS_AT_A_TIME = 1024  # handed to the pool at once
_RECORDS_OF_A_TASK = 32
_process_checker: "RecordChecker | None" = None  # of a process that only checks


@dataclass(frozen=True)
class RecordChecker:
    """Checks one record; an encoder adds the checks of text and budgets."""

    image_root: Path
    max_pixels: int
    encoder: SampleEncoder | None = None

    def __call__(self, record: Any) -> list[SampleError]:
        """All problems of a record.

        Raises:
            DataError: the system fails, which is no problem of the record.
        """
        try:
            require_line_length(len(as_line(record)))
            conversation = parse_record(record)
        except SampleError as error:
            return [error]
        images = images_of(record, str(self.image_root))
        return [
            *self._text_problems(conversation, images),
            *self._image_problems(conversation, images),
        ]

    def _text_problems(
        self, conversation: Conversation, images: ImageRoot
    ) -> Iterator[SampleError]:
        if self.encoder is not None:
            try:
                self.encoder.text_tokens(conversation, images)
            except SampleError as error:
                if error.reason not in _OF_FILES:  # found below
                    yield error

    def _image_problems(
        self, conversation: Conversation, images: ImageRoot
    ) -> Iterator[SampleError]:
        for image in dict.fromkeys(conversation.images):  # one may be there a thousand times
            kind, name = ("video", image.paths[0]) if isinstance(image, Video) else ("image", image)
            try:
                self._check_image(image, images)
            except MemoryError as error:
                raise out_of_memory(f"decoding {kind} {quoted(name)}") from error
            except SampleError as error:
                yield SampleError(error.reason, f"{kind} {quoted(name)}: {error}")

    def _check_image(self, image: str | Video, root: ImageRoot) -> None:
        preprocessor = ImagePreprocessor(1, max_pixels=self.max_pixels)
        if self.encoder is not None:
            preprocessor = self.encoder.preprocessor
        if isinstance(image, Video) or preprocessor.image_fit == "crop":
            read_squares(image, root, preprocessor)  # it can fail where decoding does not
        else:
            decode_image(read_image_file(root, image), max_pixels=self.max_pixels)


@dataclass
class Report:
    """The findings about one file."""

    path: str
    num_records: int = 0
    num_images: int = 0
    num_bad_records: int = 0
    duplicate_ids: int = 0
    """Records whose `id` an earlier record has. Harmless: the loader numbers the records itself."""
    problems: Counter[Reason] = field(default_factory=Counter)
    examples: dict[Reason, list[Rejection]] = field(default_factory=dict)

    def add(self, index: int, record: Any, problems: list[SampleError]) -> None:
        self.num_records += 1
        self.num_bad_records += bool(problems)
        self.num_images += _count_images(record)
        key = f"record {index}"
        if isinstance(record, dict) and isinstance(record.get("id"), str | int):
            key = f"record {index} (id {quoted(record['id'], 60)})"
        for problem in problems:
            self.problems[problem.reason] += 1
            examples = self.examples.setdefault(problem.reason, [])
            if len(examples) < MAX_EXAMPLES:
                examples.append(Rejection(key, problem.reason, str(problem)))

    def has_problems(self, *, ignore_missing: bool) -> bool:
        """True if anything is wrong, apart from missing images if those are expected."""
        ignored = {Reason.MISSING_IMAGE} if ignore_missing else set()
        return bool(set(self.problems) - ignored)

    def as_dict(self) -> dict[str, Any]:
        """For the JSON report."""
        return {
            "path": self.path,
            "records": self.num_records,
            "images": self.num_images,
            "bad_records": self.num_bad_records,
            "duplicate_ids": self.duplicate_ids,
            "problems": {
                str(reason): {
                    "count": count,
                    "examples": [
                        {"record": example.key, "message": example.message}
                        for example in self.examples[reason]
                    ],
                }
                for reason, count in self.problems.most_common()
            },
        }

    def table(self) -> str:
        """For people: one line per reason with its first example."""
        lines = [
            f"{self.path}: {self.num_records} records, {self.num_images} images, "
            f"{self.num_bad_records} records with problems, {self.duplicate_ids} repeated ids "
            "(harmless)"
        ]
        for reason, count in self.problems.most_common():
            first = self.examples[reason][0]
            lines.append(f"  {reason:<16} {count:>8}   e.g. {first.key}: {first.message}")
        return "\n".join(lines)


def _count_images(record: Any) -> int:
    try:
        return len(image_paths(record)) if isinstance(record, dict) else 0
    except SampleError:
        return 0


def check_records(
    records: Iterable[Any],
    checker: RecordChecker,
    *,
    path: str,
    workers: int = 1,
    processes: bool = False,
) -> Iterator[tuple[Report, int, list[SampleError]]]:
    """Check records; yields, for each one, the growing report, its number and its problems.

    Args:
        processes: the workers are processes, which take seconds to start but share no interpreter,
            and not threads.
    """
    report, ids = Report(path), array("q")
    numbered = iter(records)
    with _pool(checker, workers, processes) as (pool, check):
        while some := list(islice(numbered, _RECORDS_AT_A_TIME)):
            checked = pool.map(check, some, chunksize=_RECORDS_OF_A_TASK)
            for record, problems in zip(some, checked, strict=True):
                record_id = record.get("id") if isinstance(record, dict) else None
                if record_id is not None:
                    ids.append(hash(str(record_id)))
                number = report.num_records
                report.add(number, record, problems)
                yield report, number, problems
    report.duplicate_ids = len(ids) - len(np.unique(np.array(ids)))


@contextmanager
def _pool(
    checker: RecordChecker, workers: int, processes: bool
) -> Iterator[tuple[Executor, Callable[[Any], list[SampleError]]]]:
    if not processes:
        with ThreadPoolExecutor(workers) as threads:
            yield threads, checker
        return
    # Not forked: the tokenizer has threads of its own.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_become, initargs=(checker,))
    try:
        yield pool, _check
    except BrokenProcessPool as error:
        raise DataError(
            "a process that checks was killed, by a lack of memory perhaps; lower --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _become(checker: RecordChecker) -> None:
    """Prepare a process that checks; Ctrl-C is its parent's to handle."""
    global _process_checker
    _process_checker = checker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet_libraries()


def _check(record: Any) -> list[SampleError]:
    assert _process_checker is not None
    return _process_checker(record)
