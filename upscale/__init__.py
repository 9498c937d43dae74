"""Turn a zoo of fine-tuned models into one model that keeps every skill.

``upscale.smile(group, out, rank=32)`` builds, ``upscale.load(out)`` loads, ``upscale.evaluate(...)`` scores.
Everything is imported on first use, so that the command line starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upscale.build import smile
    from upscale.config import SmileConfig
    from upscale.evaluation import evaluate
    from upscale.loading import load
    from upscale.merging import merge

_HOME = {
    "SmileConfig": "config",
    "evaluate": "evaluation",
    "load": "loading",
    "merge": "merging",
    "smile": "build",
}
__all__ = ["SmileConfig", "evaluate", "load", "merge", "smile"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"upscale.{_HOME[name]}"), name)
    raise AttributeError(f"module 'upscale' has no attribute {name!r}")
