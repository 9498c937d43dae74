"""The file that an evaluation keeps its results in: written after each, so that a second run goes on from there."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from upscale.errors import TaskError
from upscale.evaluating.results import Result, to_json

VERSION = 1


class ResultsFile:
    """Finished results by key, from ``file`` if it is there; without a file, none.

    The file holds ``version``, what ``to_json`` gives of the run, and under ``earlier`` the results of runs before that
    this one does not ask for, so that none is lost.

    Raises:
        TaskError: the file is no results file of this version, or cannot be read or written.
    """

    def __init__(self, file: str | Path | None):
        self.file = None if file is None else Path(file)
        self.known: dict[str, Result] = {}
        if self.file is None:
            return
        if not os.access(self.file.absolute().parent, os.W_OK) or self.file.is_dir():
            raise TaskError(f"--json {self.file}: no file can be written there")
        if self.file.exists():
            self.known = {result.key: result for result in self._read()}

    def _read(self) -> list[Result]:
        assert self.file is not None
        try:
            return [*read_results(self.file, "earlier"), *read_results(self.file)]
        except TaskError as error:
            raise TaskError(
                f"--json {self.file}: exists and holds no results to go on from; remove it or choose another name"
            ) from error

    def keep(self, results: Sequence[Result]) -> None:
        """Write the run's ``results`` so far, in one step: the file is never half written."""
        if self.file is None:
            return
        again = {(result.model, result.task) for result in results}
        earlier = [asdict(r) for r in self.known.values() if (r.model, r.task) not in again]
        content = {"version": VERSION, **to_json(results), "earlier": earlier}
        scratch = self.file.with_name(f".{self.file.name}.partial")
        try:
            scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            scratch.replace(self.file)
        except OSError as error:
            raise TaskError(f"--json {self.file}: cannot be written: {error.strerror}") from error


def read_results(file: Path, which: str = "results") -> list[Result]:
    """The results of the run that wrote ``file``, or the ``earlier`` ones. Raises TaskError if it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, not {VERSION}")
        return [Result.from_json(entry) for entry in content[which]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TaskError(f"{file}: no results of an evaluation; write it with `upscale eval --json`") from error
