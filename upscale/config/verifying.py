"""Settings of a verification."""

from dataclasses import dataclass

from upscale.config.option import DTYPES, check_choices, option


@dataclass(frozen=True)
class VerifyConfig:
    """What to try a checkpoint in."""

    engine: str = option(
        "auto",
        "Engines to load it in: transformers; vllm, compared with transformers; auto, vLLM too where it is installed; "
        "none, a check of the files alone.",
    )
    expert: tuple[str, ...] = option(
        (),
        "Compare the engines with this expert forced, beside the router ('base': none); by default with each. vLLM "
        "loads the model anew for each, unless its router decides by prompt.",
        multiple=True,
        metavar="NAME",
    )
    dtype: str = option("auto", "Number format to run in.")
    device: str = option("auto", "Where transformers runs: auto, cpu, cuda ...", metavar="DEVICE")

    CHOICES = {"engine": ("auto", "transformers", "vllm", "none"), "dtype": DTYPES}  # noqa: RUF012 (a constant)

    def __post_init__(self):
        check_choices(self)
