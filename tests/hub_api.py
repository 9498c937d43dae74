"""The routes of the Hub's HTTP API that clients use to read and write models, as the Hub answers them."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_repos import ORGS, TOKENS, Refused, Repo, Request, Stored, owned

if TYPE_CHECKING:
    from tests.hub import Hub

LICENCES = ["apache-2.0", "mit", "llama3.1", "other"]  # some of those that the Hub knows
DATE = "2026-01-01T00:00:00.000Z"
_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_MODEL = f"/api/models/{_REPO}"
_OBJECT = "/lfs/(?P<holder>[^/]+/[^/]+)/(?P<sha256>[0-9a-f]{64})"
ROUTES = [
    ("whoami", "GET", "/api/whoami-v2"),
    ("create", "POST", "/api/repos/create"),
    ("validate", "POST", "/api/validate-yaml"),
    ("info", "GET", _MODEL),
    ("info", "GET", f"{_MODEL}/revision/(?P<rev>.+)"),
    ("refs", "GET", f"{_MODEL}/refs"),
    ("branch", "POST", f"{_MODEL}/branch/(?P<name>.+)"),
    ("tag", "POST", f"{_MODEL}/tag/(?P<rev>.+)"),
    ("tree", "GET", f"{_MODEL}/tree/(?P<rev>[^/]+)(?P<path>/.*)?"),
    ("paths_info", "POST", f"{_MODEL}/paths-info/(?P<rev>.+)"),
    ("preupload", "POST", f"{_MODEL}/preupload/(?P<rev>.+)"),
    ("commit", "POST", f"{_MODEL}/commit/(?P<rev>.+)"),
    ("batch", "POST", rf"/{_REPO}\.git/info/lfs/objects/batch"),
    ("lfs_put", "PUT", _OBJECT),
    ("lfs_get", "GET|HEAD", _OBJECT),
    ("lfs_part", "PUT", f"{_OBJECT}/part/(?P<number>[0-9]+)"),
    ("lfs_complete", "POST", f"{_OBJECT}/complete"),
    ("lfs_verify", "POST", f"{_OBJECT}/verify"),
    ("resolve", "GET|HEAD", f"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
]
_WRITES = {"branch", "tag", "preupload", "commit", "batch"}


def _route(verb: str, path: str) -> tuple[str, dict[str, Any]]:
    """The name of the route, and what its pattern found in the path."""
    for name, verbs, pattern in ROUTES:
        if verb in verbs.split("|") and (match := re.fullmatch(pattern, path)):
            return name, {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
    return "unknown", {}


class Answer(BaseHTTPRequestHandler):
    """One connection; a route's name is the method that answers it."""

    protocol_version = "HTTP/1.1"
    server: "Hub"
    hang_up = False  # instead of answering

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query, self.data = parse_qs(url.query), self.body()
        name, given = _route(self.command, url.path)
        self.server.requests.append(Request(self.command, name, self.path, self.headers.get("Range", "")))
        if name in self.server.hold:
            self.server.hold[name].wait()
        if self.server.due(self.server.fail, name):
            return self.send(503, {"error": "try again"})
        self.hang_up = self.server.due(self.server.drop, name)
        try:
            if "repo" in given:
                given["repo"] = self.repo(given["repo"], name)
            getattr(self, name)(**given)
        except Refused as error:
            named = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self.send(error.status, {"error": error.message}, {**named, **error.headers})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send(self, status: int, content: Any = b"", headers: Mapping[str, str] | None = None) -> None:
        if self.hang_up:
            self.close_connection = True
            return
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # ----------------------------------------------------------------------------------------- who may do what
    @property
    def user(self) -> str | None:
        """Whose token came along; raises for one that is nobody's, as the Hub does even for what is public."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in TOKENS:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return TOKENS[given][0] if given else None

    def repo(self, repo_id: str, route: str) -> Repo:
        user, repo = self.user, self.server.repos.get(repo_id)
        if repo is None or not repo.readable(user):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if route in _WRITES:
            self.check_write(repo_id.split("/")[0])
        return repo

    def check_write(self, owner: str | None) -> None:
        if (user := self.user) is None:
            raise Refused(401, "", "Invalid username or password.")
        role = TOKENS[self.headers["Authorization"].removeprefix("Bearer ")][1]
        if role != "write" or owner not in owned(user):
            raise Refused(403, "", "You don't have the required permissions to write here")

    def revision(self, repo: Repo, rev: str) -> str:
        if (sha := repo.resolve(rev)) is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return sha

    # ----------------------------------------------------------------------------------- account and repositories
    def unknown(self) -> None:
        self.send(404, {"error": f"no route {self.path}"})

    def whoami(self) -> None:
        if (user := self.user) is None:
            raise Refused(401, "", "Invalid username or password.")
        orgs = [{"name": name} for name in ORGS[user]]
        self.send(200, {"type": "user", "name": user, "fullname": user, "orgs": orgs, "auth": {"type": "access_token"}})

    def create(self) -> None:
        wanted = json.loads(self.data)
        owner = wanted.get("organization") or self.user
        self.check_write(owner)
        repo_id = f"{owner}/{wanted['name']}"
        about = {"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.server.repos:
            return self.send(409, {"error": "You already created this model repo", **about})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.server.repos[repo_id] = Repo(repo_id, private)
        self.send(200, about)

    def validate(self) -> None:
        said = re.search(r"^license: (\S+)$", json.loads(self.data)["content"], re.MULTILINE)
        if said and said[1] not in LICENCES:
            raise Refused(400, "", f'"license" must be one of {LICENCES}')
        self.send(200, {"errors": [], "warnings": []})

    def info(self, repo: Repo, rev: str = "main") -> None:
        sha = self.revision(repo, rev)
        about = {"_id": "0", "id": repo.id, "modelId": repo.id, "sha": sha, "private": repo.private}
        about |= {"gated": repo.gated and "manual", "tags": [], "createdAt": DATE, "lastModified": DATE}
        siblings = [
            {"rfilename": path, "size": file.size, "blobId": file.oid, **self.lfs(file, "sha256")}
            for path, file in sorted(repo.files(sha).items())
        ]
        self.send(200, {**about, "siblings": siblings})

    def refs(self, repo: Repo) -> None:
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.refs.items()]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in repo.tags.items()]
        self.send(200, {"branches": branches, "converts": [], "tags": tags})

    def branch(self, repo: Repo, name: str) -> None:
        start = self.revision(repo, json.loads(self.data or b"{}").get("startingPoint") or "main")
        if name in repo.refs:
            raise Refused(409, "", "Reference already exists")
        repo.refs[name] = start
        self.send(200, {})

    def tag(self, repo: Repo, rev: str) -> None:
        sha, name = self.revision(repo, rev), json.loads(self.data)["tag"]
        if name in repo.tags:
            raise Refused(409, "", "Tag reference exists already")
        repo.tags[name] = sha
        self.send(200, {})

    @staticmethod
    def lfs(file: Stored, key: str) -> dict:
        return {"lfs": {key: file.sha256, "size": file.size, "pointerSize": 134}} if file.lfs else {}

    def entry(self, path: str, file: Stored) -> dict:
        return {"type": "file", "path": path, "size": file.size, "oid": file.oid, **self.lfs(file, "oid")}

    def tree(self, repo: Repo, rev: str, path: str = "") -> None:
        files, start = repo.files(self.revision(repo, rev)), path.strip("/")
        self.send(200, [self.entry(p, f) for p, f in sorted(files.items()) if p.startswith(start and f"{start}/")])

    def paths_info(self, repo: Repo, rev: str) -> None:
        files = repo.files(self.revision(repo, rev))
        try:
            paths = json.loads(self.data)["paths"]
        except ValueError:
            paths = parse_qs(self.data.decode()).get("paths", [])
        self.send(200, [self.entry(path, files[path]) for path in paths if path in files])

    # ------------------------------------------------------------------------------------------------------ upload
    def preupload(self, repo: Repo, rev: str) -> None:
        sha = self.revision(repo, rev)
        there, answers = repo.files(sha), []
        for file in json.loads(self.data)["files"]:
            path, old = file["path"], there.get(file["path"])
            mode = "lfs" if self.server.is_lfs(path, file["size"]) else "regular"
            known = {"oid": old.sha256 if old.lfs else old.oid} if old else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self.send(200, {"files": answers, "commitOid": sha})

    def batch(self, repo: Repo) -> None:
        objects, limit = [], self.server.part_size
        for wanted in json.loads(self.data)["objects"]:
            sha256, size = wanted["oid"], wanted["size"]
            href, item = f"{self.server.url}/lfs/{repo.id}/{sha256}", {"oid": sha256, "size": size}
            if sha256 not in repo.objects:
                upload: dict[str, Any] = {"href": href, "header": {}}
                if limit and size > limit:
                    parts = {f"{n:05}": f"{href}/part/{n}" for n in range(1, -(-size // limit) + 1)}
                    upload = {"href": f"{href}/complete", "header": {"chunk_size": str(limit), **parts}}
                item["actions"] = {"upload": upload, "verify": {"href": f"{href}/verify", "header": {}}}
            objects.append(item)
        self.send(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def take(self, holder: str, sha256: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refused(422, "", "the content has another SHA-256")
        self.server.blob(sha256).write_bytes(content)
        self.server.repos[holder].objects.add(sha256)
        self.send(200, {})

    def lfs_put(self, holder: str, sha256: str) -> None:
        self.take(holder, sha256, self.data)

    def lfs_part(self, holder: str, sha256: str, number: str) -> None:
        self.server.parts[sha256, int(number)] = self.data
        self.send(200, b"", {"ETag": f'"{hashlib.md5(self.data).hexdigest()}"'})

    def lfs_complete(self, holder: str, sha256: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.data)["parts"]]
        self.take(holder, sha256, b"".join(self.server.parts.pop((sha256, number)) for number in numbers))

    def lfs_verify(self, holder: str, sha256: str) -> None:
        there = sha256 in self.server.repos[holder].objects
        whole = there and self.server.blob(sha256).stat().st_size == json.loads(self.data)["size"]
        self.send(200 if whole else 422, {})

    def commit(self, repo: Repo, rev: str) -> None:
        header, *lines = (json.loads(line) for line in self.data.splitlines() if line.strip())
        with self.server.lock:
            parent, wanted = self.revision(repo, rev), header["value"]
            if not parent.startswith(wanted.get("parentCommit") or ""):
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(repo.files(parent))
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = self.server.keep(value["path"], base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    if value["oid"] not in repo.objects:
                        raise Refused(400, "", f"LFS object {value['oid']} was never uploaded")
                    files[value["path"]] = self.server.stored(value["oid"], lfs=True)
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            sha = repo.commit(files, parent, wanted["summary"])
            answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo.id}/commit/{sha}"}
            if "create_pr" in self.query:
                number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
                repo.refs[f"refs/pr/{number}"] = sha
                answer["pullRequestUrl"] = f"{self.server.url}/{repo.id}/discussions/{number}"
            else:
                repo.refs[rev] = sha
        self.send(200, answer)

    # ---------------------------------------------------------------------------------------------------- download
    def resolve(self, repo: Repo, rev: str, path: str) -> None:
        if repo.gated and (user := self.user) not in repo.granted:
            raise Refused(403 if user else 401, "GatedRepo", f"Access to model {repo.id} is restricted.")
        sha = self.revision(repo, rev)
        if (file := repo.files(sha).get(path)) is None:
            raise Refused(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
        about = {"X-Repo-Commit": sha, "ETag": f'"{file.sha256 if file.lfs else file.oid}"'}
        if file.lfs:
            linked = {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"'}
            return self.send(
                302, b"", {**about, **linked, "Location": f"{self.server.storage}/lfs/{repo.id}/{file.sha256}"}
            )
        self.serve(file.sha256, about)

    def lfs_get(self, holder: str, sha256: str) -> None:
        self.serve(sha256, {"ETag": f'"{sha256}"'})

    def serve(self, sha256: str, headers: dict[str, str]) -> None:
        """A file, or the range of it that was asked for."""
        content = self.server.blob(sha256).read_bytes()
        if sha256 in self.server.altered:
            content = bytes([content[0] ^ 1]) + content[1:]
        headers["Accept-Ranges"] = "bytes"
        if not (match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return self.send(200, content, headers)
        start, stop = int(match[1]), min(int(match[2] or len(content)) + 1, len(content))
        if start >= len(content):
            return self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        self.send(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})
