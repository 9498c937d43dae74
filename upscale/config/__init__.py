"""Settings as frozen dataclasses. The help text of every option stands here, once, for the CLI and the docs."""

from upscale.config.adapting import AdaptConfig
from upscale.config.building import BuildConfig, SmileConfig, WemoeConfig
from upscale.config.calibrating import CalibrateConfig
from upscale.config.evaluating import METRICS, EvalConfig
from upscale.config.option import recipe
from upscale.config.verifying import VerifyConfig

__all__ = [
    "METRICS",
    "AdaptConfig",
    "BuildConfig",
    "CalibrateConfig",
    "EvalConfig",
    "SmileConfig",
    "VerifyConfig",
    "WemoeConfig",
    "recipe",
]
