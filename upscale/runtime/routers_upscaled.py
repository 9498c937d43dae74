"""The routers by the name that ``config.json`` has for them."""

from collections.abc import Callable, Mapping

from .calibrated_upscaled import CalibratedRouter
from .ensembling_upscaled import EnsemblingRouter
from .layout_upscaled import ModuleLayout
from .projection_upscaled import ProjectionRouter
from .router_upscaled import Router

ROUTERS: dict[str, Callable[..., Router]] = {
    "projection": ProjectionRouter,
    "calibrated": CalibratedRouter,
    "ensembling": EnsemblingRouter,
}


def make_router(modules: Mapping[str, ModuleLayout], settings: Mapping) -> Router:
    """The router that ``settings`` (of ``config.json``) describes. Raises ValueError for an unknown type."""
    if (kind := settings["type"]) not in ROUTERS:
        raise ValueError(f"router {kind!r} is unknown to this version of upscale-zoo; it knows {', '.join(ROUTERS)}")
    return ROUTERS[kind](modules, **{k: v for k, v in settings.items() if k not in ("type", "tensors")})
