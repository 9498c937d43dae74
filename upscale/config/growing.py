"""Settings of adding experts to a finished checkpoint."""

from dataclasses import dataclass

from upscale.config.option import check_least, option
from upscale.errors import ConfigError


@dataclass(frozen=True)
class AddConfig:
    """What may differ for an expert that is added; all else is as the checkpoint's recipe says."""

    rank: int | None = option(None, "Rank of the new experts, instead of the recipe's.", metavar="R")
    energy: float | None = option(
        None, "Part of each of the new experts' squared deltas to keep, instead of the recipe's way.", metavar="PART"
    )
    device: str = option("cpu", "Where to factor: cpu, cuda, cuda:1 ...", metavar="DEVICE")
    max_memory: str | None = option(None, "Refuse to start if it would take more memory, e.g. 4GiB.", metavar="SIZE")

    CHOICES = {}  # noqa: RUF012 (a constant, not a field)

    def __post_init__(self):
        check_least(self, rank=1)
        if self.rank is not None and self.energy is not None:
            raise ConfigError("--rank and --energy exclude each other: each decides all ranks")
