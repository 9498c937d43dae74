"""What a Hub keeps: accounts, repositories, commits, and the requests that came in."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

TOKENS = {"hf_alice": ("alice", "write"), "hf_read": ("alice", "read"), "hf_bob": ("bob", "write")}
ORGS = {"alice": ["acme"], "bob": []}  # whom a user may write for beside themselves


def owned(user: str | None) -> list[str]:
    """The names that a user may write under."""
    return [user, *ORGS[user]] if user else []


class Stored(NamedTuple):
    """A file of a commit; ``oid`` is git's, of the file or of its LFS pointer."""

    size: int
    oid: str
    sha256: str
    lfs: bool


@dataclass(frozen=True)
class Commit:
    files: Mapping[str, Stored]
    parent: str | None
    title: str


@dataclass
class Repo:
    """A repository with an empty first commit, as the Hub makes it.

    ``gated`` asks for a grant beside a token; ``refs`` holds branches and pull requests.
    """

    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)  # users
    objects: set[str] = field(default_factory=set)  # LFS files that were uploaded, by SHA-256
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.refs["main"] = self.commit({}, None, "initial commit")

    def commit(self, files: Mapping[str, Stored], parent: str | None, title: str) -> str:
        content = [self.id, sorted(files.items()), parent, title, len(self.commits)]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = Commit(files, parent, title)
        return sha

    def resolve(self, revision: str) -> str | None:
        found = self.refs.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> Mapping[str, Stored]:
        sha = self.resolve(revision)
        assert sha is not None, revision
        return self.commits[sha].files

    def titles(self, revision: str = "main") -> list[str]:
        """Of the commits that lead to ``revision``, the last first."""
        titles, sha = [], self.resolve(revision)
        while sha is not None:
            titles.append(self.commits[sha].title)
            sha = self.commits[sha].parent
        return titles

    def readable(self, user: str | None) -> bool:
        return not self.private or self.id.split("/")[0] in owned(user)


class Request(NamedTuple):
    verb: str
    route: str
    path: str
    range: str


class Refused(Exception):
    """An answer that is an error: status, the Hub's code for it, message."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None):
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})
        super().__init__(message)
