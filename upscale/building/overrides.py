"""Settings of single experts that differ from their group's: of experts that a finished checkpoint was given."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from upscale.config import BuildConfig

Overrides = Mapping[str, Mapping[str, Any]]  # by expert, fields of BuildConfig
_FIELDS = ("rank", "budget", "energy", "seed")


def settings_of(experts: Iterable[str], config: BuildConfig, overrides: Overrides) -> dict[str, BuildConfig]:
    """By expert, in order, its settings; ``seed`` is that of its own sketches, the group's plus its number.

    Raises:
        ConfigError: an override is out of range, or does not go together with the group's settings.
    """
    # A sketch of its own for each expert: with one for all, flat spectra look as if they shared directions.
    seeds = {expert: (config.seed + number) % 2**63 for number, expert in enumerate(experts)}
    return {e: replace(config, **{"seed": seed, **overrides.get(e, {})}) for e, seed in seeds.items()}


def overrides_of(settings: Mapping[str, BuildConfig], config: BuildConfig) -> dict[str, dict[str, Any]]:
    """What ``settings_of`` needs to be told to give these settings."""
    found = {}
    for expert, plain in settings_of(settings, config, {}).items():
        own = settings[expert]
        if differing := {f: getattr(own, f) for f in _FIELDS if getattr(own, f) != getattr(plain, f)}:
            found[expert] = differing
    return found


def unused_seed(settings: Mapping[str, BuildConfig], config: BuildConfig) -> int:
    """The seed of the sketches of an expert that comes behind these: by its number, unless one has that already."""
    used = {own.seed for own in settings.values()}
    numbers = [len(settings), *range(len(settings))]
    return next(seed for number in numbers if (seed := (config.seed + number) % 2**63) not in used)
