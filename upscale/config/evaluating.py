"""Settings of evaluation."""

from dataclasses import dataclass

from upscale.config.option import DTYPES, check_choices, check_least, check_template, option
from upscale.errors import ConfigError

METRICS = ("exact_match", "contains", "accuracy", "accuracy_norm", "loglikelihood", "perplexity", "byte_perplexity")


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
        check_least(self, limit=1, max_new_tokens=1, batch_size=1)
        if self.oracle and self.expert is not None:
            raise ConfigError("--oracle and --expert exclude each other: both force an expert")
        check_template(self)
        check_choices(self)
