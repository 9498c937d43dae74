"""Settings as frozen dataclasses. The help text of every option stands here, once, for the CLI and the docs."""

from dataclasses import dataclass, field, fields
from typing import Any

from upscale.errors import ConfigError

DTYPES = ("auto", "float32", "float16", "bfloat16")
METRICS = ("exact_match", "contains", "accuracy", "accuracy_norm", "loglikelihood", "perplexity", "byte_perplexity")


def option(default: Any, help: str, **click: Any) -> Any:
    """A dataclass field that is also a command-line option; ``click`` goes to ``click.option``."""
    return field(default=default, metadata={"help": help, "click": click})


def _check_choices(config: Any) -> None:
    for name, choices in config.CHOICES.items():
        if getattr(config, name) not in choices:
            raise ConfigError(f"--{name} must be one of {', '.join(choices)}, not {getattr(config, name)!r}")


def _check_template(config: Any) -> None:
    if "{prompt}" not in config.prompt_template:
        raise ConfigError(f"--prompt-template {config.prompt_template!r} does not contain {{prompt}}")
    if config.chat and config.prompt_template != "{prompt}":
        raise ConfigError("--chat and --prompt-template exclude each other: the chat template is the template")


@dataclass(frozen=True)
class SmileConfig:
    """How to build a SMILE model (arXiv 2408.10174)."""

    rank: int = option(
        64, "Rank of each low-rank expert; clamped to what a matrix allows, so a large one is full rank.", metavar="R"
    )
    router_rank: int = option(8, "Leading directions of each expert that its router looks at.", metavar="K")
    top_k: int = option(1, "Experts that serve a token in each linear.", metavar="N")
    budget: str | None = option(
        None,
        "Size of the result against the base's, e.g. 1.5x, instead of one rank: ranks follow the spectra.",
        metavar="N.NNx",
    )
    energy: float | None = option(
        None,
        "Part of every module's and expert's squared delta to keep, e.g. 0.95, instead of one rank.",
        metavar="PART",
    )
    scope: str = option(
        "linear", "How far back the projection router gathers evidence: this linear, this block's, or the model's."
    )
    granularity: str = option("token", "Evidence of this token alone, or its mean over the prefix.")
    standardise: bool = option(
        False,
        "Divide the energies of each linear by their mean over experts (always so in wider scopes).",
        is_flag=True,
    )
    include: tuple[str, ...] = option(
        (), "Upscale only modules whose name matches this glob pattern, e.g. '*.mlp.*'.", multiple=True, metavar="GLOB"
    )
    exclude: tuple[str, ...] = option(
        (), "Leave out modules whose name matches this glob pattern.", multiple=True, metavar="GLOB"
    )
    rest: str = option(
        "experts",
        "What becomes of embeddings, output head and norms: experts too (a projection router leaves embeddings and "
        "norms idle), the base's, or the experts' average.",
    )
    lm_head: bool = option(False, "Upscale the output head also where --rest is not 'experts'.", is_flag=True)
    exact: bool = option(False, "Factor by full SVD instead of a random sketch: slow, the reference.", is_flag=True)
    dtype: str = option("auto", "Number format of the written tensors; 'auto' keeps each tensor's own.")
    device: str = option("cpu", "Where to factor: cpu, cuda, cuda:1 ...", metavar="DEVICE")
    seed: int = option(0, "Seed of the random sketch: same seed, same bytes.", metavar="N")

    CHOICES = {  # noqa: RUF012 (a constant, not a field)
        "rest": ("experts", "base", "average"),
        "scope": ("linear", "block", "model"),
        "granularity": ("token", "prefix"),
        "dtype": DTYPES,
    }

    def __post_init__(self):
        for name in ("rank", "router_rank", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed must be at least 0 and less than 2**63, not {self.seed}")
        if self.budget is not None and self.energy is not None:
            raise ConfigError("--budget and --energy exclude each other: each decides all ranks")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(f"--energy must be above 0 and at most 1, not {self.energy}")
        if self.budget is None and self.energy is None and self.router_rank > self.rank:
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
class CalibrateConfig:
    """How to calibrate the router of an upscaled checkpoint."""

    top_k: int = option(1, "Classes that a token is routed to; 0 mixes all by their probability.", metavar="N")
    granularity: str = option(
        "prompt", "Decide once for a prompt and its answer, or at every token from the prefix up to it."
    )
    depth: int | None = option(
        None,
        "With --granularity prefix, read the hidden states that enter this block (0: the embeddings, so that every "
        "layer is routed); by default the first that is as good as any.",
        metavar="N",
    )
    no_base: bool = option(False, "Always choose an expert: no class for text of no expert's domain.", is_flag=True)
    half_life: float | None = option(
        None,
        "Tokens after which a token counts half, so that a conversation may change subject; by default all count.",
        metavar="TOKENS",
    )
    continuation: int = option(
        32,
        "With --granularity prefix, tokens of each expert's own answer to its prompts that the router learns too.",
        metavar="N",
    )
    samples: int = option(128, "Texts that the base writes to learn the base class from.", metavar="N")
    prompt_template: str = option(
        "{prompt}", "Text around a prompt, as it will be used; \\n and \\t are understood.", metavar="TEMPLATE"
    )
    chat: bool = option(False, "Prompts are chat messages, to go through the chat template.", is_flag=True)
    dtype: str = option("auto", "Number format to run in.")
    device: str = option("auto", "Where to run: auto, cpu, cuda ...", metavar="DEVICE")
    seed: int = option(0, "Seed of the texts that models write.", metavar="N")

    CHOICES = {"granularity": ("prompt", "prefix"), "dtype": DTYPES}  # noqa: RUF012 (a constant, not a field)

    def __post_init__(self):
        if self.depth and self.granularity == "prompt":
            raise ConfigError("--depth needs --granularity prefix: of a prompt, only the embeddings are known at once")
        for name, least in (("top_k", 0), ("continuation", 0), ("samples", 4), ("depth", 0), ("seed", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if self.half_life is not None and not 0 < self.half_life < float("inf"):
            raise ConfigError(f"--half-life must be more than 0 tokens, not {self.half_life}")
        _check_template(self)
        _check_choices(self)

    def to_recipe(self) -> dict:
        """The settings that decide the result, as plain values for ``upscale.yaml``."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "device"}


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
    oracle: bool = option(
        False,
        "Run every upscaled model a second time with the right expert, the one named like the task.",
        is_flag=True,
    )
    metric: str = option("auto", "What is scored; each kind of task has a default, and its own metrics.")
    prompt_template: str = option(
        "{prompt}", "Text around a row's prompt; \\n and \\t are understood.", metavar="TEMPLATE"
    )
    chat: bool = option(False, "Send the prompt as a chat message, through the chat template.", is_flag=True)
    limit: int | None = option(None, "Use only the first rows of each task.", metavar="N")
    max_new_tokens: int = option(128, "Longest answer, in tokens.", metavar="N")
    batch_size: int = option(32, "Prompts run together (transformers) or in flight (URL).", metavar="N")
    dtype: str = option("auto", "Number format to run in.")
    device: str = option("auto", "Where transformers runs: auto, cpu, cuda ...", metavar="DEVICE")

    CHOICES = {"metric": ("auto", *METRICS), "dtype": DTYPES}  # noqa: RUF012 (a constant, not a field)

    def __post_init__(self):
        for name in ("limit", "max_new_tokens", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.oracle and self.expert is not None:
            raise ConfigError("--oracle and --expert exclude each other: both force an expert")
        _check_template(self)
        _check_choices(self)
