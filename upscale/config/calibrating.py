"""Settings of calibration."""

from dataclasses import dataclass

from upscale.config.option import DTYPES, check_choices, check_least, check_template, option
from upscale.errors import ConfigError


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
        check_least(self, top_k=0, continuation=0, samples=4, depth=0, seed=0)
        if self.half_life is not None and not 0 < self.half_life < float("inf"):
            raise ConfigError(f"--half-life must be more than 0 tokens, not {self.half_life}")
        check_template(self)
        check_choices(self)
