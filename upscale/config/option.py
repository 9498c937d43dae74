"""What the settings share: a field that is also a command-line option, and checks."""

from dataclasses import field, fields
from typing import Any

from upscale.errors import ConfigError

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


def recipe(config: Any) -> dict:
    """The settings that decide the result, as plain values for ``upscale.yaml``."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "device"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
