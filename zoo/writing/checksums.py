"""``checksums.json``: the SHA-256 of each tensor's bytes and of each file that does not change after the build."""

import hashlib
import json
from collections.abc import Mapping

CHECKSUMS = "checksums.json"
# A router, or a card with results, is given to a checkpoint later.
_CHANGING = {"config.json", "upscale.yaml", "README.md"}


def checksums(tensors: Mapping[str, str], files: Mapping[str, bytes]) -> bytes:
    """The content of ``checksums.json``.

    Args:
        tensors: SHA-256 by name, of those in the shards.
        files: the other files' content by name.
    """
    lasting = {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files.keys() - _CHANGING)}
    return _content({"tensors": dict(sorted(tensors.items())), "files": lasting})


def amended(content: bytes, files: Mapping[str, bytes]) -> bytes:
    """``checksums.json`` after some of the files that it lists were replaced."""
    found = json.loads(content)
    for name in found["files"].keys() & files.keys():
        found["files"][name] = hashlib.sha256(files[name]).hexdigest()
    return _content(found)


def _content(found: Mapping) -> bytes:
    return json.dumps(found, indent=1).encode() + b"\n"
