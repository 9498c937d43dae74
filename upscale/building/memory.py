"""What a build holds in memory at its peak, from shapes and formats alone.

A tensor of the base and of one expert are held as they are stored, the expert's delta in float32, and beside them what
the method makes of it. Experts that are stored as factors take less.
"""

import resource
import sys
from pathlib import Path

from upscale.building.linalg import OVERSAMPLE
from upscale.building.skeleton import Linear
from upscale.config.option import parse_size
from upscale.errors import ConfigError
from upscale.runtime.layout_upscaled import DENSE, LOW_RANK, SPARSE, ModuleLayout

_WORKING = 64 << 20  # bytes that libraries take once they compute
_FLOAT, _DOUBLE = 4, 8


def resident() -> int:
    """Bytes of memory that this process holds now, mostly its libraries'; where that is not told, has held at most."""
    state = Path("/proc/self/statm")
    if state.is_file():
        return int(state.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def of_linear(
    linear: Linear, layout: ModuleLayout, *, base: int, expert: int, cast: int, exact: bool, factored: bool
) -> int:
    """Bytes that it takes to upscale a linear.

    Args:
        linear: which one.
        layout: the largest that it can get.
        base, expert: bytes of a number in the base and in an expert.
        cast: bytes of a number of the base as it is written; 0 if it is copied as it is.
        exact: whether deltas are factored by full SVD.
        factored: whether every expert's delta is stored as factors, so that it is never as large as the linear.
    """
    i, o, experts = linear.in_features, linear.out_features, len(layout.ranks)
    n, short, rank = i * o, min(i, o), max(layout.ranks, default=0)
    if layout.vectors == DENSE:
        return n * (base + 2 * experts * _FLOAT)  # one by one, then together
    if layout.vectors == SPARSE:
        return n * (base + 3 * _FLOAT + 2 * _DOUBLE)  # magnitudes are sorted, with their places
    stored = sum(layout.ranks) * (i + o) * _FLOAT
    if factored and layout.vectors == LOW_RANK:
        return of_cast(n, base=base, cast=cast) + 3 * stored
    before = stored - rank * (i + o) * _FLOAT  # of the experts before the last
    if exact or rank + OVERSAMPLE >= short:
        factoring = (n + short * (i + o) + 5 * short**2) * _FLOAT
    else:
        factoring = 3 * (rank + OVERSAMPLE) * (i + o) * _FLOAT
    return max(n * (base + _FLOAT) + before + max(n * expert, factoring), n * base + 3 * stored)


def of_rest(n: int, *, base: int, expert: int, cast: int, merge: str | None, factored: bool) -> int:
    """Bytes that it takes to merge a tensor of ``n`` numbers that is not upscaled; ``merge`` None: to compare it.

    The other arguments are those of ``of_linear``.
    """
    held = {None: 1, "ties": 7}.get(merge, 2)  # in float32
    return max(of_cast(n, base=base, cast=cast), 0 if factored else n * (base + expert + held * _FLOAT))


def of_cast(n: int, *, base: int, cast: int) -> int:
    """Bytes that it takes to write ``n`` numbers of the base in another format, if ``cast`` is one."""
    return n * (base + cast) if cast else 0


def of_spectrum(n: int, short: int, *, expert: int) -> int:
    """Bytes that it takes to find the spectrum of a delta of ``n`` numbers, ``short`` on its shorter side."""
    return n * (expert + 2 * _FLOAT) + 3 * short**2 * _DOUBLE


def peak(sizes: dict[str, int]) -> int:
    """Bytes of memory of the whole process at its peak, for what the single modules and tensors take."""
    return resident() + _WORKING + max(sizes.values(), default=0)


def require(limit: str | None, sizes: dict[str, int]) -> None:
    """Raise ConfigError if the peak is above ``--max-memory``; names the module or tensor that takes most."""
    if limit is None or (needed := peak(sizes)) <= (allowed := parse_size(limit, "--max-memory")):
        return
    name = max(sizes, key=sizes.__getitem__)
    raise ConfigError(
        f"--max-memory {limit} is {allowed / 1e9:.2f} GB, and {name} alone makes the peak {needed / 1e9:.2f} GB, "
        f"{resident() / 1e9:.2f} GB of it libraries; allow that much, lower --rank or leave it out by --exclude"
    )
