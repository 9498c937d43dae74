"""A Hub on the loopback: repositories, commits and files behind the Hub's own HTTP API, for real clients to talk to.

What it answers is in ``hub_api``; here is what it keeps, and how a test makes it misbehave.
"""

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

from tests.hub_api import Answer
from tests.hub_repos import Repo, Request, Stored


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repos: by id.
        requests: all so far.
        fail: how many times a route still answers 503.
        drop: how many times a route still does its work and then hangs up without an answer.
        hold: routes that do not answer before the event is set.
        altered: SHA-256 of files that are served with a wrong first byte.
        part_size: LFS files above it are uploaded in parts.
        lfs_threshold: files from this size on are LFS files whatever they are called.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root
        self.repos: dict[str, Repo] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.lock = threading.Lock()
        self.lfs_threshold = 10 << 20
        self.port = self.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        # Where LFS files lie: under another host's name, at which clients stop following a HEAD.
        self.storage = f"http://localhost:{self.port}"
        self.behave()

    def behave(self) -> None:
        """Forget the requests, and every order to misbehave."""
        self.requests: list[Request] = []
        self.fail: dict[str, int] = {}
        self.drop: dict[str, int] = {}
        self.hold: dict[str, threading.Event] = {}
        self.altered: set[str] = set()
        self.part_size: int | None = None

    def routes(self) -> list[str]:
        """Of the requests so far."""
        return [request.route for request in self.requests]

    def due(self, orders: dict[str, int], route: str) -> bool:
        """Whether an order holds for one more request of this route."""
        with self.lock:
            orders[route] = orders.get(route, 0) - 1
            return orders[route] >= 0

    def add(self, repo_id: str, files: Mapping[str, bytes], **settings) -> str:
        """Commit ``files`` to a repository, made if need be, without HTTP; returns the commit."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id, **settings))
        stored = {name: self.keep(name, content) for name, content in files.items()}
        repo.refs["main"] = repo.commit({**repo.files(), **stored}, repo.refs["main"], "added")
        return repo.refs["main"]

    def keep(self, name: str, content: bytes) -> Stored:
        digest = hashlib.sha256(content).hexdigest()
        self.blob(digest).write_bytes(content)
        return self.stored(digest, lfs=self.is_lfs(name, len(content)))

    def stored(self, sha256: str, *, lfs: bool) -> Stored:
        """The entry of a commit for a file that is there."""
        size = self.blob(sha256).stat().st_size
        if lfs:
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        else:
            content = self.blob(sha256).read_bytes()
        return Stored(size, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), sha256, lfs)

    def is_lfs(self, name: str, size: int) -> bool:
        return Path(name).suffix in {".safetensors", ".bin", ".gguf", ".pt", ".png"} or size >= self.lfs_threshold

    def blob(self, sha256: str) -> Path:
        return self.root / sha256

    def read(self, repo_id: str, name: str, revision: str = "main") -> bytes:
        return self.blob(self.repos[repo_id].files(revision)[name].sha256).read_bytes()

    def environment(self, home: Path, token: str | None = "hf_alice") -> dict[str, str]:
        """For a client in a process of its own: this Hub, its own cache in ``home``, online."""
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        return {**kept, **own, **({"HF_TOKEN": token} if token else {}), "OMP_NUM_THREADS": "1"}


@contextmanager
def running_hub(root: Path) -> Iterator[Hub]:
    """A Hub that serves while the context lasts, with its files in ``root``."""
    with Hub(root) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
