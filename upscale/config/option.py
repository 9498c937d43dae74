"""What the settings share: a field that is also a command-line option, and checks."""

import re
from dataclasses import field, fields
from typing import Any

from upscale.errors import ConfigError

_MACHINE = {"device", "max_memory"}  # settings of where it runs, which decide nothing of the result
DTYPES = ("auto", "float32", "float16", "bfloat16")


def option(default: Any, help: str, **click: Any) -> Any:
    """A dataclass field that is also a command-line option; ``click`` goes to ``click.option``."""
    return field(default=default, metadata={"help": help, "click": click})


def flag(name: str) -> str:
    """The command-line option of a field."""
    return f"--{name.replace('_', '-')}"


def check_choices(config: Any) -> None:
    """Raise ConfigError if a field is none of its choices."""
    for name, choices in config.CHOICES.items():
        if getattr(config, name) not in choices:
            raise ConfigError(f"{flag(name)} must be one of {', '.join(choices)}, not {getattr(config, name)!r}")


def check_least(config: Any, **least: int) -> None:
    """Raise ConfigError if a field that is given is below its least value."""
    for name, value in least.items():
        if (found := getattr(config, name)) is not None and found < value:
            raise ConfigError(f"{flag(name)} must be at least {value}, not {found}")


def check_template(config: Any) -> None:
    """Raise ConfigError if a prompt's template has no place for it, or stands beside a chat template."""
    if "{prompt}" not in config.prompt_template:
        raise ConfigError(f"--prompt-template {config.prompt_template!r} does not contain {{prompt}}")
    if config.chat and config.prompt_template != "{prompt}":
        raise ConfigError("--chat and --prompt-template exclude each other: the chat template is the template")


def parse_size(text: str, flag: str) -> int:
    """A number of bytes: ``4GiB``, ``4 GB``, ``512MiB``, ``1000000``. Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(?:([kmgt])(i?)b?|b)?", text.strip(), re.ASCII | re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ConfigError(f"{flag} {text}: write a size with its unit, e.g. 4GiB")
    power = "kmgt".index(found[2].lower()) + 1 if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def recipe(config: Any) -> dict:
    """The settings that decide the result, as plain values for ``upscale.yaml``."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _MACHINE}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
