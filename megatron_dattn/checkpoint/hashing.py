"""sha256 beside other work: a helper thread hashes a block while its owner writes or reads.

A thread may die before it begins, or not begin at all, where memory is short; `threading` and
`concurrent.futures` then wait for it for ever, in the middle of a save. Here a block that the
helper has not taken by the time its sum is needed is hashed by whoever needs it, so nobody waits
for a thread that does not run.
"""

import _thread
import hashlib
import queue
from typing import Any

# Of smaller blocks the sum costs less than the helper.
_WORTH_HELP = 256 * 1024


class HashBeside:
    """Context manager: a sha256 that is fed block by block.

    `begin` a block, do other work that leaves its bytes as they are, `finish` it: one at a time.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._blocks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._hashed = _thread.allocate_lock()  # held from `begin` until the block is hashed
        self._failure: BaseException | None = None
        self._asked_for_help = False

    def __enter__(self) -> "HashBeside":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._asked_for_help:
            self._blocks.put(None)

    def begin(self, block: Any) -> None:
        """Hand over the next block: bytes, or anything with their interface."""
        if memoryview(block).nbytes >= _WORTH_HELP and not self._asked_for_help:
            self._ask_for_help()
        self._hashed.acquire()
        self._blocks.put(block)

    def finish(self) -> None:
        """Wait until the block is hashed, or hash it here if nobody else has begun."""
        try:
            block = self._blocks.get_nowait()
        except queue.Empty:
            self._hashed.acquire()
            self._hashed.release()
        else:
            self._hash(block)
        if self._failure is not None:
            raise self._failure

    def hexdigest(self) -> str:
        """The sum of all blocks so far, after `finish`."""
        return self._digest.hexdigest()

    def _ask_for_help(self) -> None:
        self._asked_for_help = True
        try:
            _thread.start_new_thread(self._help, ())
        except (RuntimeError, MemoryError):
            return  # no thread is to be had

    def _help(self) -> None:
        while (block := self._blocks.get()) is not None:
            self._hash(block)
            del block  # not kept alive until the next one comes

    def _hash(self, block: Any) -> None:
        try:
            self._digest.update(block)
        except BaseException as failure:
            self._failure = failure
        finally:
            self._hashed.release()
