"""Settings of adaptation."""

from dataclasses import dataclass

from upscale.config.option import DTYPES, check_choices, check_least, check_template, option
from upscale.errors import ConfigError


@dataclass(frozen=True)
class AdaptConfig:
    """How to train the routers of an upscaled checkpoint, without labels."""

    objective: str = option(
        "distil",
        "distil: predict what the prompt's own expert predicts; entropy: be sure of whatever is predicted (the paper).",
    )
    steps: int = option(200, "Steps of Adam, at most.", metavar="N")
    lr: float = option(1e-3, "Learning rate.", metavar="RATE")
    batch_size: int = option(4, "Prompts of each expert in a step.", metavar="N")
    continuation: int = option(
        32, "Tokens of the greedy answer to each prompt at which the objective is taken.", metavar="N"
    )
    held_out: float = option(
        0.25, "Part of each expert's prompts to judge the routers by instead of training on it.", metavar="PART"
    )
    judge_every: int = option(20, "Steps from one judgement to the next.", metavar="N")
    patience: int = option(5, "Judgements without any gain after which to stop.", metavar="N")
    prompt_template: str = option(
        "{prompt}", "Text around a prompt, as it will be used; \\n and \\t are understood.", metavar="TEMPLATE"
    )
    chat: bool = option(False, "Prompts are chat messages, to go through the chat template.", is_flag=True)
    dtype: str = option("float32", "Number format to train in; routers are float32 in any case.")
    device: str = option("auto", "Where to run: auto, cpu, cuda ...", metavar="DEVICE")
    seed: int = option(0, "Seed of the order of prompts.", metavar="N")

    CHOICES = {"objective": ("distil", "entropy"), "dtype": DTYPES}  # noqa: RUF012 (a constant, not a field)

    def __post_init__(self):
        check_least(self, steps=1, batch_size=1, continuation=1, judge_every=1, patience=1, seed=0)
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"--lr must be more than 0, not {self.lr}")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"--held-out must be at least 0 and less than 1, not {self.held_out}")
        check_template(self)
        check_choices(self)
