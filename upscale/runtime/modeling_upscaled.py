"""Run an upscaled checkpoint in transformers: inject the experts into the base's own model, load their tensors."""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.utils import logging

from .architecture_upscaled import UPSCALED, autos_of, model_class
from .dense_upscaled import DenseExperts, SparseExperts
from .heads_upscaled import Heads
from .layout_upscaled import DENSE, EMBEDDING, NORM, SPARSE, Layout, ModuleLayout
from .mixture_upscaled import EmbeddingExperts, Experts, LinearExperts, NormExperts, TiedExperts
from .prefix_upscaled import follow
from .router_upscaled import Router, in_block
from .routers_upscaled import make_router
from .routing_upscaled import Routing

MODEL_TYPE = "upscaled"
_LAYERS = {DENSE: DenseExperts, SPARSE: SparseExperts, EMBEDDING: EmbeddingExperts, NORM: NormExperts}


# --------------------------------------------------------------------------------------------------------- injection
def inject(model: Any, layout: Layout) -> Routing:
    """Attach (uninitialised) experts to the named modules of any model, by forward hooks, and return its Routing.

    The base's modules stay as they are, of whatever class (quantised, wrapped by an adapter, Conv1D): they gain a child
    ``experts``, in the model's float format, and a hook that adds its output. The router is a child of the model.
    """
    routing = Routing(layout.experts, make_router(layout.modules, layout.router))
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    follow(model, routing.router)
    watch(model, model.get_input_embeddings(), list(layout.modules), routing.router)
    for name, module_layout in layout.modules.items():
        module = model.get_submodule(name)
        layer = _layer(module_layout)
        device = next(module.parameters()).device
        experts: Any = layer(name, module_layout, routing, dtype=dtype, device=device)
        for parameter in experts.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        module.experts = experts
        if module_layout.tied:
            experts.share(model.get_submodule(module_layout.tied).experts)
        if module_layout.kind == EMBEDDING:
            experts.__dict__["once"] = module is not model.get_input_embeddings()
        scale = {"scale": _row_scale} if module_layout.kind == EMBEDDING else {}
        module.register_forward_hook(partial(_add_experts, **scale))
    model.router = routing.router
    if layout.heads:
        model.heads = Heads(model, routing, layout.heads, dtype=dtype, device=model.device)
    return routing


def _layer(layout: ModuleLayout) -> type[Experts]:
    return TiedExperts if layout.tied else _LAYERS.get(layout.kind) or _LAYERS.get(layout.vectors, LinearExperts)


def _add_experts(module: Any, args: tuple, y: Tensor, scale: Callable | None = None) -> Tensor:
    return module.experts(args, y) if scale is None else module.experts(args, y, scale(module, y))


def _row_scale(embedding: nn.Module, y: Tensor) -> Tensor | float:
    """What a scaled embedding (Gemma's, BART's) multiplies its rows by."""
    scale = getattr(embedding, "embed_scale", 1.0)
    return scale.to(y.dtype) if isinstance(scale, Tensor) else scale


def watch(model: nn.Module, embedding: nn.Module, modules: Sequence[str], router: Router) -> None:
    """Show the router what it watches: the tokens, and what enters decoder blocks. Serves both runtimes.

    The blocks are the module list that the first of ``modules`` (names of upscaled modules) inside one lies in.
    """
    if router.watches(0):
        embedding.register_forward_pre_hook(partial(_read, router))
    parts = next((name.split(".") for name in modules if in_block(name)), None)
    if parts is None:
        return
    blocks: Any = model.get_submodule(".".join(parts[: next(n for n, part in enumerate(parts) if part.isdigit())]))
    for depth, block in enumerate(blocks):
        if depth and router.watches(depth):
            names = tuple(inspect.signature(block.forward).parameters)
            block.register_forward_pre_hook(partial(_enter, router, depth, names), with_kwargs=True)


def _read(router: Router, embedding: nn.Module, args: tuple) -> None:
    router.read(args[0])


def _enter(router: Router, depth: int, names: Sequence[str], block: nn.Module, args: tuple, kwargs: Mapping) -> None:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, residual = given["hidden_states"], given.get("residual")  # vLLM's blocks add the residual themselves
    router.enter(depth, x if residual is None else x + residual)


# ------------------------------------------------------------------------------------------------------ configuration
class UpscaledConfig(PretrainedConfig):
    """``config.json`` of an upscaled checkpoint: the base's own fields, ``base_model_type`` and ``upscale``."""

    model_type = MODEL_TYPE


def upscaled_config(base: Mapping, layout: Layout) -> dict:
    """``config.json`` of an upscaled checkpoint from the base's: loud for whoever does not know the format."""
    architectures = [f"{UPSCALED}{a}" for a in base.get("architectures") or []]
    own = {"model_type": MODEL_TYPE, "base_model_type": base["model_type"], "architectures": architectures}
    classes = {"AutoConfig": UpscaledConfig, **dict.fromkeys(autos_of(base), UpscaledPreTrained)}
    auto_map = {name: f"{Path(__file__).stem}.{made.__name__}" for name, made in classes.items()}
    return {**base, **own, "auto_map": auto_map, "upscale": layout.to_config()}


def base_fields(config: Mapping) -> dict:
    """The base's own ``config.json``, from an upscaled checkpoint's."""
    fields = {key: value for key, value in config.items() if key not in ("auto_map", "upscale", "base_model_type")}
    fields["model_type"] = config["base_model_type"]
    fields["architectures"] = [a.removeprefix(UPSCALED) for a in config.get("architectures") or []]
    if not fields["architectures"]:
        del fields["architectures"]
    return fields


def base_config(config: Mapping, **kwargs) -> PretrainedConfig:
    """The base's own config object, from an upscaled checkpoint's ``config.json``; ``kwargs`` go to ``from_dict``."""
    return CONFIG_MAPPING[config["base_model_type"]].from_dict(base_fields(config), **kwargs)


# --------------------------------------------------------------------------------------------------------- the model
class UpscaledModel:
    """What an upscaled model can do beside its base class's own methods; ``model.routing`` is its Routing."""

    routing: Routing
    layout: Layout

    @contextmanager
    def force(self, expert: str | Sequence[str] | None) -> Iterator[None]:
        """Within the context, route every token to ``expert`` (one name, or one per sequence; "base" for none)."""
        before, self.routing.forced = self.routing.forced, self.routing.one_hot(expert)
        try:
            yield
        finally:
            self.routing.forced = before

    def generate(self, *args, expert: str | Sequence[str] | None = None, **kwargs):
        """``generate`` of the base class; ``expert`` forces one expert, or one per sequence of the batch."""
        if expert is None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        with self.force(expert):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Write the checkpoint in its own format: the base class alone would name it a plain model of its type."""
        layout = self.layout
        if "tensors" in layout.router:  # saved as the model's parameters, whatever the router's file called them before
            layout = replace(layout, router={**layout.router, "tensors": "router"})
        # Under the names that the layout has, not those of older versions that transformers would go back to.
        super().save_pretrained(save_directory, **{"save_original_format": False, **kwargs})  # type: ignore[misc]
        path = Path(save_directory) / "config.json"
        fields = json.loads(path.read_text())
        fields["architectures"] = [a.removeprefix(UPSCALED) for a in fields["architectures"]]
        path.unlink()
        stored_tensors(Path(save_directory), layout)  # transformers may rename a head, and its experts, on saving
        for file in Path(__file__).parent.glob("*_upscaled.py"):
            Path(save_directory, file.name).write_bytes(file.read_bytes())
        path.write_text(json.dumps(upscaled_config(fields, layout), indent=2) + "\n")


class UpscaledPreTrained:
    """Loads an upscaled checkpoint: the base by its own class and loader, then the experts into the named modules."""

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel") -> None:
        """Nothing to register: the checkpoint's ``auto_map`` names this class."""

    @classmethod
    def from_pretrained(cls, path, *, config=None, expert: str | None = None, router: Mapping | None = None, **kwargs):
        """Load from a directory or a Hub id.

        Args:
            path: directory or Hub id (with ``revision``, ``token``, ``cache_dir`` ... as for any model).
            config: ignored; the checkpoint's ``config.json`` is the authority on its layout.
            expert: route every token to this expert ("base" for none) instead of by the router.
            router: settings of a router without tensors to use instead of the checkpoint's.
            kwargs: passed to the base class's ``from_pretrained`` (``dtype``, ``device_map``, ...).

        Returns:
            The base class's model with experts injected; also an UpscaledModel.

        Raises:
            ValueError: unknown format version, router or expert; tensors missing or of a wrong shape.
        """
        hub = {
            k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only") if kwargs.get(k) is not None
        }
        if not Path(path).is_dir():
            path = snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"], **hub)
        fields = json.loads(Path(path, "config.json").read_text())
        layout = Layout.from_config(fields["upscale"] if router is None else {**fields["upscale"], "router": router})
        tensors = stored_tensors(Path(path), layout)
        for key in ("trust_remote_code", "revision", "adapter_kwargs", "output_loading_info"):
            kwargs.pop(key, None)
        kwargs["ignore_mismatched_sizes"] = True  # they are refused below, by name
        with _quiet():
            loaded: Any = model_class(fields).from_pretrained(
                path, config=base_config(fields), output_loading_info=True, **kwargs
            )
        model, info = loaded
        if bad := [*info["missing_keys"], *info["mismatched_keys"]]:
            raise ValueError(f"{path}: base tensors missing or of a wrong shape: {sorted(map(str, bad))[:5]}")
        routing = inject(model, layout)
        routing.router.to(model.device)
        with torch.no_grad():
            for name, read in tensors.items():
                model.get_parameter(name).copy_(read())
        routing.forced = routing.one_hot(expert)
        model.__class__ = type(f"{UPSCALED}{type(model).__name__}", (UpscaledModel, type(model)), {})
        model.routing, model.layout = routing, layout
        return model


def stored_tensors(path: Path, layout: Layout) -> dict[str, Callable[[], Tensor]]:
    """By parameter of the model, a function that reads each expert's and router's tensor of the checkpoint.

    Raises:
        ValueError: a tensor is missing or of a wrong shape.
    """
    index = path / "model.safetensors.index.json"
    files = sorted(path.glob("*.safetensors"))
    if index.is_file():
        files = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if not files:
        raise ValueError(f"{path}: no weights (neither model.safetensors nor {index.name})")
    shards = [safe_open(file, framework="pt") for file in files]
    where = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118 (safe_open has no __iter__)
    shapes = {name: (name, shape) for name, shape in layout.shapes().items()}
    for tensor, shape in make_router(layout.modules, layout.router).shapes().items():
        shapes[f"router.{tensor}"] = (f"{layout.router['tensors']}.{tensor}", shape)
    tensors = {}
    for parameter, (name, shape) in shapes.items():
        if name not in where:
            remedy = "calibrate" if parameter.startswith("router.") else "build"
            raise ValueError(f"{path}: tensor {name} is missing; {remedy} the checkpoint again")
        if (found := tuple(where[name].get_slice(name).get_shape())) != shape:
            raise ValueError(f"{path}: tensor {name} has shape {found}, config.json says {shape}")
        tensors[parameter] = lambda shard=where[name], name=name: shard.get_tensor(name)
    return tensors


@contextmanager
def _quiet() -> Iterator[None]:
    """The base class's loader finds the experts' tensors unexpected and says so at length; we check them ourselves."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
