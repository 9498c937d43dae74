"""One writer a directory: a lock that ends with the process, however it ends."""

import fcntl
import os
from pathlib import Path


def hold(directory: Path) -> int:
    """Lock a directory against other writers, until the descriptor that is returned is closed.

    Raises:
        BlockingIOError: another process holds it, or has renamed or removed it since.
        OSError: it is not there.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not directory.exists() or not os.path.samestat(os.fstat(descriptor), directory.stat()):
            raise BlockingIOError
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
