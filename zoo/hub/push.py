"""Push files to a model repository: one commit or none, nothing uploaded twice, no matter how often it is tried."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import HubError
from zoo.hub.asking import asking, require_token, retried


@dataclass(frozen=True)
class Target:
    """Where to push.

    Attributes:
        repo: ``org/name``; made if it is not there.
        revision: a branch, made from ``main`` if it is not there; None for ``main``.
        private: make the repository private.
        pull_request: open a pull request instead of changing the branch.
        token: of the Hub; None for the one that the user is logged in with.
    """

    repo: str
    revision: str | None = None
    private: bool = False
    pull_request: bool = False
    token: str | None = None

    def __post_init__(self):
        if self.pull_request and self.revision is not None:
            raise HubError("--pr and --revision exclude each other: a pull request is a branch of its own")
        if self.repo.count("/") != 1:
            raise HubError(f"{self.repo}: not a model's id; write org/name (data sets and Spaces hold no models)")


@dataclass(frozen=True)
class Pushed:
    """What a push did; of an unchanged model it is nothing.

    Attributes:
        commit: the commit that holds the model now.
        url: of that commit, or of the pull request.
        sent: names of the files that were new or different.
        deleted: names of the files of an earlier version.
    """

    commit: str
    url: str
    sent: tuple[str, ...]
    deleted: tuple[str, ...]


def push(files: Mapping[str, Path | bytes], target: Target, *, owned: Callable[[str], bool], title: str) -> Pushed:
    """Make ``target`` hold ``files``, in one commit: until it is made, nobody sees any of them.

    Files that are there with the same content are not sent. Uploads come before the commit, and what has been uploaded
    by a push that was killed is not uploaded again.

    Args:
        files: by name; paths, or the content of small ones.
        target: where.
        owned: whether a file on the Hub, by its name, belongs to the model and goes if it is none of ``files``.
        title: of the commit.

    Raises:
        HubError: no access, no Hub, another model there, or somebody else pushed meanwhile; nothing was changed, but
            an empty repository or branch may be new.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    require_token(target.repo, target.token)
    api = HfApi(token=target.token)
    with asking(target.repo):
        if "README.md" in files:
            retried(lambda: _validate(api, target, files["README.md"]))
        retried(lambda: _prepare(api, target))
        additions = {
            name: CommitOperationAdd(name, str(file) if isinstance(file, Path) else file)
            for name, file in sorted(files.items())
        }
        return retried(lambda: _commit(api, target, additions, owned, title))


def _validate(api: Any, target: Target, card: Path | bytes) -> None:
    """Ask the Hub whether it would take the card: ``create_commit`` does so too late, ``ModelCard`` not every Hub."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    content = (card.read_bytes() if isinstance(card, Path) else card).decode()
    answer = get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"repoType": "model", "content": content},
        headers=build_hf_headers(token=target.token),
    )
    if answer.status_code == 400:
        raise HubError(f"{target.repo}: the Hub refuses README.md: {' '.join(answer.text.split())}")
    hf_raise_for_status(answer)


def _prepare(api: Any, target: Target) -> None:
    """The repository, and its branch."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        private = api.model_info(target.repo).private
    except RepositoryNotFoundError:
        api.create_repo(target.repo, private=target.private or None, exist_ok=True)
    else:
        if target.private and not private:
            raise HubError(f"{target.repo}: is public already; make it private on its page, or choose another name")
    if target.revision is not None:
        api.create_branch(target.repo, branch=target.revision, exist_ok=True)


def _commit(api: Any, target: Target, additions: Mapping[str, Any], owned: Callable[[str], bool], title: str) -> Pushed:
    """One try. It compares anew: the commit of a try before may have been made and its answer lost."""
    from huggingface_hub import CommitOperationDelete

    info = api.model_info(target.repo, revision=target.revision, files_metadata=True)
    there = {file.rfilename: file for file in info.siblings}
    if "config.json" in there and "upscale.yaml" not in there:
        raise HubError(f"{target.repo}: holds another model, which would be lost; choose another name")
    changed = [add for name, add in additions.items() if name not in there or not _same(add, there[name])]
    deleted = sorted(name for name in there if owned(name) and name not in additions)
    if not changed and not deleted:
        return Pushed(info.sha, f"{api.endpoint}/{target.repo}/commit/{info.sha}", (), ())
    made = api.create_commit(
        target.repo,
        [*changed, *(CommitOperationDelete(name, is_folder=False) for name in deleted)],
        commit_message=title,
        revision=target.revision,
        create_pr=target.pull_request,
        parent_commit=info.sha,
    )
    return Pushed(made.oid, made.pr_url or made.commit_url, tuple(add.path_in_repo for add in changed), tuple(deleted))


def _same(addition: Any, there: Any) -> bool:
    """Whether a file on the Hub has the content that would be sent."""
    if addition.upload_info.size != there.size:
        return False
    if there.lfs is not None:
        return addition.upload_info.sha256.hex() == there.lfs.sha256
    with addition.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == there.blob_id
