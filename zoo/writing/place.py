"""Where a directory is made: hidden beside the one it becomes, held by one process, put in its place in one step."""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from zoo.errors import OutputError
from zoo.writing.lock import hold
from zoo.writing.swap import restore, swap, sync


class Place:
    """The place of a directory ``out`` until ``publish`` makes it.

    Attributes:
        out: the directory to make.
        work: the hidden one, ``.OUT.partial``; may hold what a killed process left.
        whole: in it, what becomes ``out``.

    Args:
        out: must not exist.
        replace: must be a checkpoint, whose place the new one takes.

    Raises:
        OutputError: it exists (with ``replace``: does not), cannot be written, or another process writes it.
    """

    def __init__(self, out: str | Path, *, replace: bool):
        self.out = Path(out).absolute()
        self.work = self.out.parent / f".{self.out.name}.partial"
        self.whole, self._aside = self.work / "whole", self.work / "aside"
        self._replace = replace
        self._locks: list[int] = []
        self._made = [parent for parent in self.work.parents if not parent.exists()]
        try:
            self._claim()
        except BlockingIOError as error:
            self._release()
            raise OutputError(f"{self.out}: another process is building it; wait for it or choose another") from error
        except (OSError, OutputError) as error:
            with suppress(OSError):  # never made, or with what a killed process left
                self.work.rmdir()
            self._release()
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{self.out}: cannot be written: {error.strerror}") from error

    def _claim(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self._locks.append(hold(self.work))
        restore(self.out, self._aside)
        if self._replace and not (self.out / "config.json").is_file():
            raise OutputError(f"{self.out}: no checkpoint, so there is nothing to replace")
        if self._replace:
            self._locks.append(hold(self.out))
        elif os.path.lexists(self.out):
            raise OutputError(f"{self.out}: exists already; choose another directory or remove it")

    @property
    def held(self) -> bool:
        """Whether it is still this process's."""
        return bool(self._locks)

    def clear(self, keep: Iterable[Path] = ()) -> None:
        """Remove what lies in ``work``, but for some files."""
        for left in set(self.work.iterdir()) - set(keep):
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def publish(self) -> None:
        """Make ``whole`` the directory ``out``, in one step. Raises OSError: ``out`` was made meanwhile."""
        sync(self.whole)
        if self._replace:
            swap(self.whole, self.out, self._aside)
        else:
            self.whole.rename(self.out)

    def leave(self) -> None:
        """Remove what is not ``out``, and let others write."""
        restore(self.out, self._aside)
        shutil.rmtree(self.work, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        for parent in self._made:
            with suppress(OSError):  # not made after all, or another process writes there too
                parent.rmdir()
        for lock in self._locks:
            os.close(lock)
        self._locks = []
