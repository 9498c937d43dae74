"""The `upscale` command in a process that talks to a Hub: huggingface_hub reads its environment when it is imported.

One process runs command after command, so that libraries are imported once.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.hub import Hub


class Done(NamedTuple):
    """How a command ended, and what it printed."""

    exit_code: int
    output: str


class Client:
    """The process; commands run in ``directory``, with the token given."""

    def __init__(self, process: subprocess.Popen[str], directory: Path):
        self.process, self.directory = process, directory

    def __call__(self, *args: str | Path, token: str = "hf_alice") -> Done:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([token, *map(str, args)]) + "\n")
        self.process.stdin.flush()
        return Done(*json.loads(self.process.stdout.readline()))


@contextmanager
def client(hub: Hub, directory: Path) -> Iterator[Client]:
    """A client of ``hub`` that has its cache under ``directory``."""
    command = [sys.executable, "-m", "tests.hub_client"]
    environment = {**hub.environment(directory / "cache"), "PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment, cwd=directory, text=True, **pipes) as process:
        yield Client(process, directory)
        assert process.stdin is not None
        process.stdin.close()


def _serve() -> None:
    from tests.cli_runs import upscale

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    for line in sys.stdin:
        token, *args = json.loads(line)
        os.environ["HF_TOKEN"] = token
        result = upscale(*args)
        answers.write(json.dumps([result.exit_code, result.output]) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
