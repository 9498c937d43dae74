"""Settings as frozen dataclasses. The help text of every option stands here, once, for the CLI and the docs."""

from dataclasses import dataclass, field, fields
from typing import Any

from upscale.errors import ConfigError

DTYPES = ("auto", "float32", "float16", "bfloat16")


def option(default: Any, help: str, **click: Any) -> Any:
    """A dataclass field that is also a command-line option; ``click`` goes to ``click.option``."""
    return field(default=default, metadata={"help": help, "click": click})


@dataclass(frozen=True)
class SmileConfig:
    """How to build a SMILE model (arXiv 2408.10174)."""

    rank: int = option(
        64, "Rank of each low-rank expert; clamped to what a matrix allows, so a large one is full rank.", metavar="R"
    )
    router_rank: int = option(8, "Leading directions of each expert that its router looks at.", metavar="K")
    top_k: int = option(1, "Experts that serve a token in each linear.", metavar="N")
    include: tuple[str, ...] = option(
        (), "Upscale only linears whose name matches this glob pattern, e.g. '*.mlp.*'.", multiple=True, metavar="GLOB"
    )
    exclude: tuple[str, ...] = option(
        (), "Leave out linears whose name matches this glob pattern.", multiple=True, metavar="GLOB"
    )
    lm_head: bool = option(False, "Upscale the output head too.", is_flag=True)
    rest: str = option(
        "base", "Where parameters that are not upscaled come from: the base, or the average of the experts."
    )
    exact: bool = option(False, "Factor by full SVD instead of a random sketch: slow, the reference.", is_flag=True)
    dtype: str = option("auto", "Number format of the written tensors; 'auto' keeps each tensor's own.")
    device: str = option("cpu", "Where to factor: cpu, cuda, cuda:1 ...", metavar="DEVICE")
    seed: int = option(0, "Seed of the random sketch: same seed, same bytes.", metavar="N")

    CHOICES = {"rest": ("base", "average"), "dtype": DTYPES}  # noqa: RUF012 (a constant, not a field)

    def __post_init__(self):
        for name in ("rank", "router_rank", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.router_rank > self.rank:
            raise ConfigError(
                f"--router-rank {self.router_rank} is larger than --rank {self.rank}: "
                "the router looks at the experts' own directions; lower it or raise --rank"
            )
        for name, choices in self.CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"--{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")

    def to_recipe(self) -> dict:
        """The settings that decide the result, as plain values for ``upscale.yaml``."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "device"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
