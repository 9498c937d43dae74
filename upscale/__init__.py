"""Turn a zoo of fine-tuned models into one model that keeps every skill.

``upscale.smile(group, out, rank=32)`` builds, as does ``upscale.wemoe``; ``upscale.calibrate(out, prompts)`` fits
the router, ``upscale.load(out)`` loads, ``upscale.evaluate(...)`` scores; ``upscale.add`` and ``upscale.remove`` change
which experts there are, ``upscale.extract_lora`` and ``upscale.extract_model`` take one out.
Everything is imported on first use, so that the command line starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upscale.adapting.adaptation import adapt
    from upscale.building.build import smile, wemoe
    from upscale.building.rebuild import rebuild
    from upscale.calibrating.calibration import calibrate
    from upscale.config import (
        AdaptConfig,
        CalibrateConfig,
        EvalConfig,
        SmileConfig,
        VerifyConfig,
        WemoeConfig,
    )
    from upscale.evaluating.evaluation import evaluate
    from upscale.growing.extract import extract_lora, extract_model
    from upscale.growing.grow import add, remove
    from upscale.growing.inventory import inventory
    from upscale.importing.fusionbench import import_fusionbench
    from upscale.loading import load
    from upscale.merging.merging import merge
    from upscale.verifying.verify import verify

_HOME = {
    "AdaptConfig": "config",
    "CalibrateConfig": "config",
    "EvalConfig": "config",
    "SmileConfig": "config",
    "VerifyConfig": "config",
    "WemoeConfig": "config",
    "adapt": "adapting.adaptation",
    "add": "growing.grow",
    "calibrate": "calibrating.calibration",
    "evaluate": "evaluating.evaluation",
    "extract_lora": "growing.extract",
    "extract_model": "growing.extract",
    "import_fusionbench": "importing.fusionbench",
    "inventory": "growing.inventory",
    "load": "loading",
    "merge": "merging.merging",
    "rebuild": "building.rebuild",
    "remove": "growing.grow",
    "smile": "building.build",
    "verify": "verifying.verify",
    "wemoe": "building.build",
}
__all__ = [
    "AdaptConfig",
    "CalibrateConfig",
    "EvalConfig",
    "SmileConfig",
    "VerifyConfig",
    "WemoeConfig",
    "adapt",
    "add",
    "calibrate",
    "evaluate",
    "extract_lora",
    "extract_model",
    "import_fusionbench",
    "inventory",
    "load",
    "merge",
    "rebuild",
    "remove",
    "smile",
    "verify",
    "wemoe",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"upscale.{_HOME[name]}"), name)
    raise AttributeError(f"module 'upscale' has no attribute {name!r}")
