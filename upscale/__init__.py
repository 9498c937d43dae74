"""Turn a zoo of fine-tuned models into one model that keeps every skill.

``upscale.smile(group, out, rank=32)`` builds, as does ``upscale.wemoe``; ``upscale.calibrate(out, prompts)`` fits
the router, ``upscale.load(out)`` loads, ``upscale.evaluate(...)`` scores.
Everything is imported on first use, so that the command line starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upscale.adapting.adaptation import adapt
    from upscale.building.build import smile, wemoe
    from upscale.building.rebuild import rebuild
    from upscale.calibrating.calibration import calibrate
    from upscale.config import AdaptConfig, CalibrateConfig, EvalConfig, SmileConfig, WemoeConfig
    from upscale.evaluating.evaluation import evaluate
    from upscale.loading import load
    from upscale.merging.merging import merge

_HOME = {
    "AdaptConfig": "config",
    "CalibrateConfig": "config",
    "EvalConfig": "config",
    "SmileConfig": "config",
    "WemoeConfig": "config",
    "adapt": "adapting.adaptation",
    "calibrate": "calibrating.calibration",
    "evaluate": "evaluating.evaluation",
    "load": "loading",
    "merge": "merging.merging",
    "rebuild": "building.rebuild",
    "smile": "building.build",
    "wemoe": "building.build",
}
__all__ = [
    "AdaptConfig",
    "CalibrateConfig",
    "EvalConfig",
    "SmileConfig",
    "WemoeConfig",
    "adapt",
    "calibrate",
    "evaluate",
    "load",
    "merge",
    "rebuild",
    "smile",
    "wemoe",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"upscale.{_HOME[name]}"), name)
    raise AttributeError(f"module 'upscale' has no attribute {name!r}")
