"""What a build needs of this machine, and what is there."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from upscale.building.plan import Plan


@dataclass(frozen=True)
class Needs:
    """Bytes that a build needs, at most, and that are free.

    Attributes:
        disk: of the result.
        disk_free: where it is to be written.
        memory: at the peak.
        memory_free: of this machine; None where it does not say.
    """

    disk: int
    disk_free: int
    memory: int
    memory_free: int | None

    @property
    def missing(self) -> list[str]:
        """What there is too little of, a line each."""
        lines = []
        if self.disk > self.disk_free:
            lines.append(
                f"the result takes {self.disk / 1e9:.2f} GB of disk, {self.disk_free / 1e9:.2f} GB are free; free "
                "some, choose another disk, or lower --rank or --budget"
            )
        if self.memory_free is not None and self.memory > self.memory_free:
            lines.append(
                f"the build takes about {self.memory / 1e9:.2f} GB of memory, {self.memory_free / 1e9:.2f} GB are "
                "free; close what else is running, or lower --rank"
            )
        return lines


def needs(plan: Plan, where: str | Path = ".") -> Needs:
    """What a plan needs, if its result is written to a directory in ``where``, which need not exist yet."""
    place = Path(where).absolute()
    while not place.exists():
        place = place.parent
    return Needs(plan.result_bytes, shutil.disk_usage(place).free, plan.peak_bytes, _memory_free())


def _memory_free() -> int | None:
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    if found:
        return 1024 * int(found[1])
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    return os.sysconf(names[0]) * os.sysconf(names[1]) if os.sysconf_names.keys() >= set(names) else None
