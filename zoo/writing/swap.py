"""Put a new directory in the place of an old one: whoever looks finds the old or the new one."""

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h
_UNABLE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


def swap(new: Path, old: Path, aside: Path) -> None:
    """Exchange two directories in one step of the file system; what was old lies at ``new`` or ``aside`` then.

    Where the file system or the system has no such step, the old one is moved aside first: of a process that is killed
    between the two moves, ``restore`` makes good.

    Raises:
        OSError: they cannot be renamed.
    """
    try:
        _exchange(new, old)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        old.rename(aside)
        new.rename(old)


def restore(old: Path, aside: Path) -> None:
    """Undo the half of a ``swap`` that moved ``old`` aside and did no more."""
    if aside.exists() and not os.path.lexists(old):
        aside.rename(old)


def sync(directory: Path) -> None:
    """Have the names in a directory on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> None:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError as error:  # no Linux, or a C library of before 2018
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        raise OSError(number := ctypes.get_errno(), os.strerror(number), str(other))
