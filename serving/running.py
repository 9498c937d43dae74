"""A server as a child process: started, waited for, stopped."""

import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from serving.server import require_vllm, server_command
from upscale.errors import EngineError

_START_SECONDS = 600


@contextmanager
def running_server(model: str | Path, flags: Sequence[str], log: Path, expert: str | None = None) -> Iterator[str]:
    """Serve ``model`` on a free port while the context lasts.

    Args:
        model: directory or Hub id.
        flags: of ``vllm serve``.
        log: where the server's output goes.
        expert: force this expert.

    Yields:
        The server's address, ``http://127.0.0.1:PORT``; it answers.

    Raises:
        EngineError: vLLM is missing, or the server stopped or did not answer in time; with the end of its log.
    """
    require_vllm()
    with running(lambda address: server_command(str(model), [*flags, *address], expert), log) as url:
        yield url


@contextmanager
def running(
    command: Callable[[list[str]], Sequence[str]], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run a server of vLLM while the context lasts.

    Args:
        command: gives its command line for the flags that say where to listen.
        log: where its output goes.
        environment: of the process; None for this one's.

    Yields:
        The server's address; it answers.

    Raises:
        EngineError: the server stopped or did not answer in time; with the end of its log.
    """
    port = _free_port()
    started = command(["--host", "127.0.0.1", "--port", str(port)])
    with log.open("wb") as output:
        server = subprocess.Popen(started, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(server, url, log)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(server: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise EngineError(f"the server stopped with code {server.returncode}; the end of {log}:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise EngineError(f"the server did not answer in {_START_SECONDS} s; the end of {log}:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
