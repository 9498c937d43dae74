"""What the tests of the command line share: ways to run it, and groups as it takes them."""

import os
import re
import signal
import sys
from pathlib import Path

import yaml
from click.testing import CliRunner, Result

from upscale.cli import main
from zoo import Group


def upscale(*args: str | Path) -> Result:
    """The command in this process; its signal handlers do not stay."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return CliRunner().invoke(main, [str(arg) for arg in args])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command(*args: str | Path) -> list[str]:
    """The command as a process of its own."""
    return [str(Path(sys.executable).with_name("upscale")), *map(str, args)]


def inline(group: Group) -> list[str]:
    experts = [f"--expert={name}={source}" for name, source in group.experts.items()]
    return ["--base", str(group.base), *experts]


def group_file(group: Group, file: Path) -> Path:
    """The group as YAML, with paths relative to the file."""
    base, *experts = (os.path.relpath(str(source), file.parent) for source in (group.base, *group.experts.values()))
    file.write_text(yaml.safe_dump({"base": base, "experts": dict(zip(group.experts, experts, strict=True))}))
    return file


def every_file(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def assert_one_message(output: str, message: str) -> None:
    assert message in output
    assert len(re.findall(r"(?<!\w)Error: ", output)) == 1 and "Traceback" not in output
