"""Telling a broken system from broken data.

That a file is not there, is a folder or may not be read says something about this file: it is the
sample's fault. That the disk does not answer, the network's file system is gone or the process has
no descriptor left says nothing about it: counted as a missing image, an outage of ten minutes would
cost as many samples as are read in them. So such an error is waited out for some seconds, and if it
stays, the run ends and names it.
"""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from megatron_dattn.errors import OutageError
from megatron_dattn.runtime.os_errors import background

WAITS = (0.1, 0.3, 0.9, 2.2)  # seconds between tries

_OF_THE_FILE = frozenset(
    (
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EILSEQ,  # a name that this file system cannot hold
        errno.EINVAL,
        errno.EACCES,
        errno.EPERM,
        errno.ENXIO,  # a socket in the place of a file
        errno.EFBIG,
    )
)
_OUTAGE = "the file system or the network below it is out of order"

logger = logging.getLogger(__name__)

T = TypeVar("T")


def is_of_the_file(error: OSError) -> bool:
    """True if an error says something about the file alone; false: the system is broken."""
    return error.errno in _OF_THE_FILE


def patiently(what: str, read: Callable[[], T]) -> T:
    """Read, and where the system fails try again for some seconds.

    Args:
        what: what is read, for the error: image '...' below '...', say.

    Raises:
        OSError: the file's own error, at once.
        OutageError: the system still fails after the last try, or memory ran out.
    """
    for number, wait in enumerate((*WAITS, None)):
        try:
            return read()
        except MemoryError as error:
            raise out_of_memory(f"reading {what}") from error
        except OSError as error:
            if is_of_the_file(error):
                raise
            if wait is None:
                raise _system_failure(what, error) from error
            if number == 0:
                logger.warning("%s: %s; trying again for %.1f s", what, error.strerror, sum(WAITS))
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def out_of_memory(work: str) -> OutageError:
    """The error for a MemoryError, which is never a sample's fault."""
    return OutageError(
        f"memory ran out while {work}; give the job more, set fewer data.num_workers or a smaller "
        "data.packing_buffer_size, then start again from the last checkpoint"
    )


def _system_failure(what: str, error: OSError) -> OutageError:
    name = errno.errorcode.get(error.errno or 0, "OSError")
    return OutageError(
        f"{what} cannot be read: {error.strerror or error} ({name}), still after "
        f"{sum(WAITS):.1f} s. That is no fault of the data: {background(error) or _OUTAGE}; mend "
        "that, then start again; a run goes on from its last checkpoint"
    )
