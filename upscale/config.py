"""Settings as frozen dataclasses. The help text of every option stands here, once, for the CLI and the docs."""

from dataclasses import dataclass, field, fields
from typing import Any

from upscale.errors import ConfigError

DTYPES = ("auto", "float32", "float16", "bfloat16")


def option(default: Any, help: str, **click: Any) -> Any:
    """A dataclass field that is also a command-line option; ``click`` goes to ``click.option``."""
    return field(default=default, metadata={"help": help, "click": click})


def _check_choices(config: Any) -> None:
    for name, choices in config.CHOICES.items():
        if getattr(config, name) not in choices:
            raise ConfigError(f"--{name} must be one of {', '.join(choices)}, not {getattr(config, name)!r}")


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
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed must be at least 0 and less than 2**63, not {self.seed}")
        if self.router_rank > self.rank:
            raise ConfigError(
                f"--router-rank {self.router_rank} is larger than --rank {self.rank}: "
                "the router looks at the experts' own directions; lower it or raise --rank"
            )
        _check_choices(self)

    def to_recipe(self) -> dict:
        """The settings that decide the result, as plain values for ``upscale.yaml``."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "device"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class EvalConfig:
    """How to evaluate models on tasks."""

    engine: str = option(
        "transformers",
        "What runs the models: transformers, vllm, or the URL of an OpenAI-compatible server.",
        metavar="transformers|vllm|URL",
    )
    expert: str | None = option(
        None,
        "Force this expert instead of the router's choice ('base': none; 'auto': the one named like the task).",
        metavar="NAME",
    )
    metric: str = option("exact_match", "How an answer is scored against the completion.")
    prompt_template: str = option(
        "{prompt}", "Text around a row's prompt; \\n and \\t are understood.", metavar="TEMPLATE"
    )
    chat: bool = option(False, "Send the prompt as a chat message, through the chat template.", is_flag=True)
    limit: int | None = option(None, "Use only the first rows of each task.", metavar="N")
    max_new_tokens: int = option(128, "Longest answer, in tokens.", metavar="N")
    batch_size: int = option(32, "Prompts run together (transformers) or in flight (URL).", metavar="N")
    dtype: str = option("auto", "Number format to run in.")
    device: str = option("auto", "Where transformers runs: auto, cpu, cuda ...", metavar="DEVICE")

    CHOICES = {"metric": ("exact_match", "contains"), "dtype": DTYPES}  # noqa: RUF012 (a constant, not a field)

    def __post_init__(self):
        for name in ("limit", "max_new_tokens", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if "{prompt}" not in self.prompt_template:
            raise ConfigError(f"--prompt-template {self.prompt_template!r} does not contain {{prompt}}")
        if self.chat and self.prompt_template != "{prompt}":
            raise ConfigError("--chat and --prompt-template exclude each other: the chat template is the template")
        _check_choices(self)
