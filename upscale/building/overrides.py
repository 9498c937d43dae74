"""Settings of single experts that differ from their group's: of experts that a finished checkpoint was given."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from upscale.config import BuildConfig

Overrides = Mapping[str, Mapping[str, Any]]  # by expert, fields of BuildConfig: rank, budget, energy, seed


def settings_of(experts: Iterable[str], config: BuildConfig, overrides: Overrides) -> dict[str, BuildConfig]:
    """By expert, in order, its settings; ``seed`` is that of its own sketches, the group's plus its number.

    Raises:
        ConfigError: an override is out of range, or does not go together with the group's settings.
    """
    # A sketch of its own for each expert: with one for all, flat spectra look as if they shared directions.
    seeds = {expert: (config.seed + number) % 2**63 for number, expert in enumerate(experts)}
    return {e: replace(config, **{"seed": seed, **overrides.get(e, {})}) for e, seed in seeds.items()}
