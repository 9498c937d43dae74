"""What a check found, and all of them together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from upscale.verifying.reconstruction import Measured
from zoo import ZooError

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: its name.
        status: "ok", "warning", "failed" or "skipped".
        detail: one line: what is right, or why it was skipped.
        problems: what is wrong, a line each.
        figures: what was measured, as plain values.
    """

    check: str
    status: str
    detail: str = ""
    problems: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verification:
    """A report on a checkpoint.

    Attributes:
        path: of the checkpoint.
        findings: in the order in which the checks ran.
        experts: measured against the sources, by name; empty unless that was asked for.
    """

    path: str
    findings: Sequence[Finding]
    experts: Mapping[str, Measured] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether no check failed; what was skipped is not known."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """What is wrong, a line each."""
        return [line for finding in self.findings if finding.status == FAILED for line in finding.problems]

    def __getitem__(self, check: str) -> Finding:
        return next(finding for finding in self.findings if finding.check == check)

    def to_json(self) -> dict:
        """Plain values."""
        return {"ok": self.ok, **asdict(self)}


def judged(check: str, problems: Sequence[str], detail: str = "", **figures: Any) -> Finding:
    """A check that failed if there are problems."""
    return Finding(check, FAILED if problems else OK, "" if problems else detail, tuple(problems), figures)


def attempted(check: str, run: Callable[[], Finding]) -> Finding:
    """What ``run`` finds; an error that a user can cause is a problem."""
    try:
        return run()
    except ZooError as error:
        return judged(check, [str(error)])
