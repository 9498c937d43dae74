"""Pull a model from the Hub into a directory: one commit of it, checked, and there as a whole or not at all."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import HubError, OutputError
from zoo.hub.asking import asking, retried
from zoo.source import Source
from zoo.writing.checksums import CHECKSUMS
from zoo.writing.integrity import differing
from zoo.writing.lock import hold

_TRACES = ".cache"  # what huggingface_hub notes about a download that is under way


@dataclass(frozen=True)
class Pulled:
    """What was pulled: the directory and the commit that it holds."""

    directory: Path
    commit: str


def pull(source: str, directory: str | Path | None = None, *, token: str | None = None) -> Pulled:
    """Download a model's files, all of one commit, into a directory of their own.

    They come into a hidden directory beside it, which is checked against the Hub's checksums and the model's own and
    then renamed. A pull that was stopped goes on from there.

    Args:
        source: ``org/name`` or ``org/name@revision``: a branch, tag or commit.
        directory: must not exist; by default named like the model, in the current directory.
        token: of the Hub; None for the one that the user is logged in with.

    Raises:
        HubError: no such model or revision, no access, no Hub, or a file that arrived damaged.
        OutputError: the directory exists, is being written, or the disk is full.
    """
    from huggingface_hub import HfApi, snapshot_download

    model = Source.of_hub(source)
    out = Path(directory if directory is not None else model.location.rpartition("/")[2]).absolute()
    if os.path.lexists(out):
        raise OutputError(f"{out}: exists already; choose another directory or remove it")
    api, work = HfApi(token=token), out.with_name(f".{out.name}.pulled")
    with asking(model):
        info = retried(lambda: api.model_info(model.location, revision=model.revision, files_metadata=True))
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if odd := [name for name in sizes if ".." in Path(name).parts or Path(name).is_absolute()]:
        raise HubError(f"{model}: has a file {odd[0]!r}, which leads out of its directory; tell its authors")
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = hold(work)
    except BlockingIOError as error:
        raise OutputError(f"{out}: another process is pulling it; wait for it or choose another") from error
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}") from error
    try:
        needed = sum(size for name, size in sizes.items() if not (work / name).is_file())
        if needed > (free := shutil.disk_usage(work).free):
            raise OutputError(f"{out}: no space left: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
        with asking(model):
            retried(lambda: snapshot_download(model.location, revision=info.sha, local_dir=work, token=token))
            arrived = retried(lambda: api.verify_repo_checksums(model.location, revision=info.sha, local_dir=work))
        _check(model, arrived, work)
        shutil.rmtree(work / _TRACES)
        work.rename(out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}") from error
    finally:
        os.close(lock)
    return Pulled(out, str(info.sha))


def _check(model: Source, arrived: Any, work: Path) -> None:
    """Leave in ``work`` what the commit has and nothing else, or raise HubError."""
    for name in arrived.extra_paths:  # of another commit, which a pull before was after
        if not name.startswith(f"{_TRACES}/"):
            (work / name).unlink()
    damaged = [*arrived.missing_paths, *(mismatch["path"] for mismatch in arrived.mismatches)]
    for name in damaged:
        (work / name).unlink(missing_ok=True)
    if damaged:
        raise HubError(f"{model}: {damaged[0]} arrived damaged; run this again, and only that is fetched again")
    if (work / CHECKSUMS).is_file() and (changed := differing(work)):
        raise HubError(f"{model}: {changed[0]} is not what checksums.json says; it was changed after it was built")
