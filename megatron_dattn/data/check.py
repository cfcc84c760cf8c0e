"""What is wrong with a data set, found before training: the rules of the loader, without Energon.

A record is read, parsed, tokenised and its images decoded by the loader's own functions and in the
loader's order, so that the first problem that is found is the one for which training would skip it.
The others are found too. Without a tokenizer the text is not measured.
"""

import multiprocessing
import signal
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_dattn.data.check_report import Finding, RecordCheck, Report
from megatron_dattn.data.config import DatasetConfig
from megatron_dattn.data.conversation import Conversation, image_paths, parse_record
from megatron_dattn.data.dataset import open_dataset
from megatron_dattn.data.duplicates import (
    ImageHashes,
    SeenImages,
    content_hash,
    hash_of,
    repeated,
)
from megatron_dattn.data.encoder import SampleEncoder
from megatron_dattn.data.image_conversions import read_image
from megatron_dattn.data.image_decoding import decode_image
from megatron_dattn.data.image_files import ImageRoot, RecordWithImages, images_of
from megatron_dattn.data.images import ImagePreprocessor
from megatron_dattn.data.json_lines import (
    INDEX_SUFFIX,
    JsonLines,
    as_line,
    parse_line,
    require_line_length,
)
from megatron_dattn.data.missing import WITH_IMAGES_AT_A_TIME
from megatron_dattn.data.policies import Fixes, Policies
from megatron_dattn.data.problems import (
    DUPLICATE_ID,
    DUPLICATE_IMAGE,
    DUPLICATE_RECORD,
    LENGTH_PROBLEMS,
    OF_FILES,
    PROBLEMS,
)
from megatron_dattn.data.record_files import read_records
from megatron_dattn.data.rejection import Reason, SampleError
from megatron_dattn.data.squares import count_squares, may_be_several, read_squares
from megatron_dattn.data.system_errors import out_of_memory
from megatron_dattn.data.videos import Video
from megatron_dattn.errors import DataError, quoted
from megatron_dattn.runtime.log import quiet_libraries

_RECORDS_AT_A_TIME = 1024  # handed to the pool at once
_RECORDS_OF_A_TASK = 32
_MOST_MEASURED = 200_000  # characters of a text that is too long; more would take seconds
_FIXES = {problem.name: problem.fix for problem in PROBLEMS}
_process_checker: "RecordChecker | None" = None  # of a process that only checks


@dataclass(frozen=True)
class RecordChecker:
    """Checks one record; an encoder adds the checks of text and budgets."""

    image_root: Path
    max_pixels: int
    encoder: SampleEncoder | None = None
    policies: Policies = field(default_factory=Policies)

    def __call__(self, record: Any) -> RecordCheck:
        """All problems of a record, and what training would do with it.

        Args:
            record: what JSON holds; or a line of a prepared file, or why it cannot be read.

        Raises:
            DataError: the system fails, which is no problem of the record.
        """
        findings: list[Finding] = []
        lengths: tuple[int | None, int | None] = None, None
        num_images = 0
        hashes: list[ImageHashes] = []
        try:
            record = _as_loaded(record)
            conversation = parse_record(record, self.policies.fixing)
        except SampleError as error:
            findings.append(Finding(error.reason, str(error)))
            num_images = _count_images(record)
        else:
            num_images = len(image_paths(record))
            images = images_of(record, str(self.image_root))
            conversation, lengths = self._check_text(conversation, images, findings)
            hashes = self._check_images(conversation, images, findings)
            findings += [_fixed(reason) for reason in sorted(conversation.fixed)]
        rejected = next((each.problem for each in findings if not each.is_fixed), None)
        fixed = [each.problem for each in findings if each.is_fixed]
        record_id = record.get("id") if isinstance(record, dict) else None
        return RecordCheck(
            outcome=self.policies.outcome(rejected, fixed),
            findings=tuple(findings),
            num_images=num_images,
            text_tokens=lengths[0],
            visual_tokens=lengths[1],
            id_hash=None if record_id is None else hash_of(str(record_id)),
            shown_id=quoted(record_id, 60) if isinstance(record_id, str | int) else None,
            content_hash=content_hash(record) if isinstance(record, dict) else None,
            image_hashes=tuple(hashes),
        )

    def _check_text(
        self, conversation: Conversation, images: ImageRoot, findings: list[Finding]
    ) -> tuple[Conversation, tuple[int | None, int | None]]:
        """What of a conversation would be used, and its text and visual tokens."""
        if self.encoder is None:
            return conversation, (None, None)
        try:
            tokens, conversation = self.encoder.text_tokens(conversation, images)
            length: int | None = len(tokens.input_ids)
        except SampleError as error:
            findings.append(Finding(error.reason, str(error)))
            if error.reason not in LENGTH_PROBLEMS | OF_FILES:
                return conversation, (None, None)
            length = self._length(conversation)
        return conversation, (length, self._visual_tokens(conversation, images))

    def _length(self, conversation: Conversation) -> int | None:
        """Text tokens of a conversation that is too long, if they can be counted in short time."""
        assert self.encoder is not None
        if sum(len(turn.text) for turn in conversation.turns) > _MOST_MEASURED:
            return None
        try:
            return len(self.encoder.tokenizer(conversation).input_ids)
        except SampleError:
            return None

    def _visual_tokens(self, conversation: Conversation, images: ImageRoot) -> int | None:
        """Of all squares; None where a file must tell how many these are, and does not."""
        assert self.encoder is not None
        preprocessor, fixes = self.encoder.preprocessor, Fixes(self.policies.fixing)
        try:
            numbers = {
                image: count_squares(image, images, preprocessor, fixes)
                if may_be_several(image, preprocessor)
                else 1
                for image in dict.fromkeys(conversation.images)
            }
        except SampleError:
            return None
        rows, columns = self.encoder.grid
        return sum(numbers[image] for image in conversation.images) * rows * columns

    def _check_images(
        self, conversation: Conversation, images: ImageRoot, findings: list[Finding]
    ) -> list[ImageHashes]:
        hashes: list[ImageHashes] = []
        # Of several squares an image's header is read with the text, before any image is decoded.
        first = findings.pop().problem if findings and findings[0].problem in OF_FILES else None
        for image in dict.fromkeys(conversation.images):  # one may be there a thousand times
            kind, name = ("video", image.paths[0]) if isinstance(image, Video) else ("image", image)
            shown = None if isinstance(image, Video) and image.is_file else name
            fixes = Fixes(self.policies.fixing)
            try:
                hashes += self._check_image(image, images, fixes)
            except MemoryError as error:
                raise out_of_memory(f"decoding {kind} {quoted(name)}") from error
            except SampleError as error:
                message = f"{kind} {quoted(name)}: {error}"
                findings.append(Finding(error.reason, message, image=shown))
            else:
                findings += [_fixed(reason, name, shown) for reason in sorted(fixes.made)]
        if first is not None:
            findings.sort(key=lambda each: each.is_fixed or each.problem != first)
        return hashes

    def _check_image(
        self, image: str | Video, root: ImageRoot, fixes: Fixes
    ) -> tuple[ImageHashes, ...]:
        """Decode it; its hashes, which a video has none of."""
        preprocessor = ImagePreprocessor(1, max_pixels=self.max_pixels)
        if self.encoder is not None:
            preprocessor = self.encoder.preprocessor
        if isinstance(image, Video):
            read_squares(image, root, preprocessor, fixes)
            return ()
        data = read_image(root, image, fixes)
        if preprocessor.image_fit == "crop":
            preprocessor.squares(data)  # it can fail where decoding does not
        else:
            decode_image(data, max_pixels=self.max_pixels)
        return (ImageHashes.of(data, root, image),)


def _as_loaded(record: Any) -> Any:
    """A record as the loader would have it from its line.

    Raises:
        SampleError: the line is none.
    """
    if isinstance(record, bytes | SampleError):
        return parse_line(record)
    try:
        require_line_length(len(as_line(record)))
    except RecursionError as error:
        raise SampleError(Reason.BAD_RECORD, "the record is nested too deep") from error
    return record


def _fixed(reason: Reason, image: str | None = None, shown: str | None = None) -> Finding:
    what = f"image {quoted(image)}: " if image is not None else ""
    return Finding(reason, f"{what}{_FIXES[reason]}", is_fixed=True, image=shown)


def _count_images(record: Any) -> int:
    try:
        return len(image_paths(record)) if isinstance(record, dict) else 0
    except SampleError:
        return 0


def records_of(path: Path, image_root: Path) -> Iterator[Any]:
    """The records of a file; of a prepared one its lines, which the loader parses one by one.

    Raises:
        DataError: it cannot be read; of another file, a line is no JSON.
    """
    if path.suffix != ".jsonl" or not Path(f"{path}{INDEX_SUFFIX}").exists():
        yield from read_records(path)
        return
    dataset = open_dataset(DatasetConfig(str(path), str(image_root)))
    lines = JsonLines(dataset.path, dataset.num_samples)
    for number in range(dataset.num_samples):
        try:
            yield lines[number]
        except SampleError as error:
            yield error


def check_records(
    records: Iterable[Any],
    checker: RecordChecker,
    *,
    path: str,
    workers: int = 1,
    processes: bool = False,
) -> Iterator[tuple[Report, int, RecordCheck]]:
    """Check records; yields, for each one, the growing report, its number and what was found.

    The report is complete, duplicates included, when all have been taken. 16 bytes a record and 16
    an image are kept for them.

    Args:
        processes: the workers are processes, which take seconds to start but share no interpreter,
            and not threads.
    """
    report = Report.of(path, checker.image_root, checker.encoder)
    ids, contents, images = array("q"), array("q"), SeenImages()
    numbered = iter(records)
    with _pool(checker, workers, processes) as (pool, check):
        while some := _next_of(numbered):
            task = min(_RECORDS_OF_A_TASK, -(-len(some) // workers))
            for checked in pool.map(check, some, chunksize=task):
                number = report.num_records
                for hashes, own in ((ids, checked.id_hash), (contents, checked.content_hash)):
                    hashes.append(hash_of(f"nothing but {number}") if own is None else own)
                images.add(number, checked.image_hashes)
                report.add(checked)
                yield report, number, checked
    report.add_duplicates(DUPLICATE_ID, repeated(ids))
    report.add_duplicates(DUPLICATE_RECORD, repeated(contents))
    report.add_duplicates(DUPLICATE_IMAGE, images.repeated())


def _next_of(records: Iterator[Any]) -> list[Any]:
    """The next records, few where each may hold megabytes of images."""
    some = list(islice(records, WITH_IMAGES_AT_A_TIME))
    if not any(isinstance(record, RecordWithImages) for record in some):
        some += islice(records, _RECORDS_AT_A_TIME - len(some))
    return some


@contextmanager
def _pool(
    checker: RecordChecker, workers: int, processes: bool
) -> Iterator[tuple[Executor, Callable[[Any], RecordCheck]]]:
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


def _check(record: Any) -> RecordCheck:
    assert _process_checker is not None
    return _process_checker(record)
