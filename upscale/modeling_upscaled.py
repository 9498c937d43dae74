"""Run an upscaled checkpoint in transformers: read its layout, inject the mixture layers, route.

This file is copied into every checkpoint as it stands, so that ``AutoModelForCausalLM.from_pretrained(path,
trust_remote_code=True)`` works without the package; it therefore imports nothing of it. Symbols: ``B`` sequences,
``T`` tokens, ``E`` experts, ``r`` the rank of one expert, ``R`` the sum of the ranks, ``i``/``o`` in/out features.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

FORMAT_VERSION = 1
MODEL_TYPE = "upscaled"
BASE = "base"  # the name that forces no expert at all
_AUTO_MAP = {
    "AutoConfig": "modeling_upscaled.UpscaledConfig",
    "AutoModelForCausalLM": "modeling_upscaled.UpscaledForCausalLM",
}


# ---------------------------------------------------------------------------------------------------- the mathematics
def spread(w: Tensor, ranks: Sequence[int]) -> Tensor:
    """Repeat each expert's weight over its ``r`` columns: ``w`` [..., E] -> [..., R], same dtype."""
    if len(set(ranks)) == 1:
        return w.unsqueeze(-1).expand(*w.shape, ranks[0]).flatten(-2)
    return torch.cat([w[..., e : e + 1].expand(*w.shape[:-1], r) for e, r in enumerate(ranks)], dim=-1)


def energies(z: Tensor, ranks: Sequence[int], k: int) -> Tensor:
    """The norm of each expert's first ``k`` projections: ``z`` [..., R] -> [..., E], float32.

    An idle expert (rank 0: it did not change this linear) gets -inf, so that it never wins a token.
    """
    z = z.float()
    if len(set(ranks)) == 1 and ranks[0] > 0:
        return torch.linalg.vector_norm(z.unflatten(-1, (len(ranks), ranks[0]))[..., :k], dim=-1)
    idle = z.new_full(z.shape[:-1], -torch.inf)
    parts = z.split(list(ranks), dim=-1)
    return torch.stack([torch.linalg.vector_norm(p[..., :k], dim=-1) if p.shape[-1] else idle for p in parts], dim=-1)


def mixture(z: Tensor, w: Tensor, ranks: Sequence[int], up: Tensor, bias: Tensor | None) -> Tensor:
    """What the experts add to a linear's output: ``(z * w) @ up.T + w @ bias``, whoever computed ``w``.

    Args:
        z: [..., R] projections ``x @ down.T`` of the input on every expert's directions.
        w: [..., E] routing weights.
        ranks: of each expert; their sum is R.
        up: [o, R] left singular vectors times singular values.
        bias: [E, o] bias deltas, or None.

    Returns:
        [..., o] in the dtype of ``z``.
    """
    w = w.to(z.dtype)
    y = F.linear(z * spread(w, ranks), up)
    return y if bias is None else y + w @ bias


# ------------------------------------------------------------------------------------------------------------ routing
class ProjectionRouter:
    """SMILE's zero-shot router (arXiv 2408.10174, section 4): softmax over the norms of the projections, then top-k.

    It acts on its own in every linear (``scope``), from one token, and has no weights: the first ``rank`` rows of an
    expert's ``down`` are the router's vectors.
    """

    scope = "linear"

    def __init__(self, rank: int, top_k: int):
        self.rank, self.top_k = rank, top_k

    def __call__(self, x: Tensor, z: Tensor, ranks: Sequence[int]) -> Tensor:
        """Weights [..., E] in float32, at most ``top_k`` of them non-zero and summing to 1."""
        if len(ranks) == 1:
            return z.new_ones((*z.shape[:-1], 1), dtype=torch.float32)  # one expert: pure delta compression, always on
        if not any(ranks):
            return z.new_zeros((*z.shape[:-1], len(ranks)), dtype=torch.float32)  # bias deltas alone tell nothing
        p = energies(z, ranks, self.rank).softmax(dim=-1)
        if self.top_k >= len(ranks):
            return p
        top, index = p.topk(self.top_k, dim=-1)
        return torch.zeros_like(p).scatter(-1, index, top / top.sum(dim=-1, keepdim=True))


ROUTERS: dict[str, Callable] = {"projection": ProjectionRouter}


class Routing:
    """Who decides which experts a token meets: one object per model, shared by all its mixture layers.

    A router has a ``scope`` and is called as ``router(x, z, ranks)``. With scope ``"linear"`` each mixture layer calls
    it on its input ``x`` and projections ``z``. With ``"block"`` or ``"model"`` it is called on the hidden states
    [B, T, d] that enter each decoder block, or the first one alone, with ``z = ranks = None``, and its answer holds
    for every mixture layer until the next call. Forcing an expert overrides any router.
    """

    def __init__(self, experts: Sequence[str], router):
        self.experts, self.router = tuple(experts), router
        self.decided: Tensor | None = None  # [B, T, E], by a router of scope block or model
        self.forced: Tensor | None = None  # [1, E], or [B, E]: one row per sequence
        self.trace: dict[str, Tensor] | None = None  # set to {} to record the weights of a pass by module name

    def decide(self, names: Sequence[str], block: nn.Module, args: tuple, kwargs: Mapping) -> None:
        """Pre-hook of decoder blocks, whose forward has arguments ``names``: ask a router of scope block or model."""
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, residual = given["hidden_states"], given.get("residual")  # vLLM's blocks add the residual themselves
        self.decided = self.router(x if residual is None else x + residual, None, None)

    def weights(self, name: str, x: Tensor, z: Tensor, ranks: Sequence[int]) -> Tensor:
        """The weights [..., E] of the mixture layer ``name`` for its input ``x`` [..., i]."""
        given = self.decided if self.forced is None else self.forced
        w = self.router(x, z, ranks) if given is None else _fit(given.to(x.device), x)
        if self.trace is not None:
            self.trace[name] = w.detach()
        return w

    def one_hot(self, expert: str | Sequence[str] | None) -> Tensor | None:
        """Names -> [1, E] or [B, E]; ``"base"`` gives a row of zeros. Raises ValueError for an unknown name."""
        if expert is None:
            return None
        names = [expert] if isinstance(expert, str) else list(expert)
        if unknown := sorted({n for n in names if n not in (*self.experts, BASE)}):
            raise ValueError(
                f"no expert {', '.join(unknown)} in this model; it has {', '.join(self.experts)} and {BASE}"
            )
        return torch.tensor([[float(n == e) for e in self.experts] for n in names])


def _fit(w: Tensor, x: Tensor) -> Tensor:
    """Stretch given weights to the tokens of ``x``: beams repeat a sequence's row, some models flatten B and T.

    An output head may be given each sequence's last tokens alone.
    """
    if w.ndim == x.ndim == 3 and w.shape[0] == x.shape[0]:
        w = w[:, -x.shape[1] :]
    if w.ndim == x.ndim and w.shape[:-1] == x.shape[:-1]:
        return w
    per_sequence = w.ndim == 2 and x.ndim == 3
    w, tokens = w.flatten(0, -2), x.shape[:-1].numel()
    if (x.shape[0] if per_sequence else tokens) % w.shape[0]:
        raise ValueError(f"{w.shape[0]} rows of routing weights do not fit an input of shape {list(x.shape)}")
    return w.repeat_interleave(tokens // w.shape[0], dim=0).view(*x.shape[:-1], -1)


# ------------------------------------------------------------------------------------------------- layout and injection
@dataclass(frozen=True)
class ModuleLayout:
    """One upscaled linear: features, the rank of each expert (0: idle), whether bias deltas are stored."""

    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    bias: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors ``<module>.experts.*``."""
        total = sum(self.ranks)
        shapes = {"down": (total, self.in_features), "up": (self.out_features, total)}
        return shapes | ({"bias": (len(self.ranks), self.out_features)} if self.bias else {})


@dataclass(frozen=True)
class Layout:
    """The ``upscale`` section of ``config.json``: everything an engine must know before it reads a tensor."""

    method: str
    experts: tuple[str, ...]
    router: Mapping
    modules: Mapping[str, ModuleLayout]

    @classmethod
    def from_config(cls, section: Mapping) -> "Layout":
        """Parse the section. Raises ValueError for a version or router that this code does not know."""
        if (version := section.get("format_version")) != FORMAT_VERSION:
            raise ValueError(
                f"format version {version} of the upscaled checkpoint is not {FORMAT_VERSION}; update upscale-zoo"
            )
        if (kind := section["router"]["type"]) not in ROUTERS:
            raise ValueError(
                f"router {kind!r} is unknown to this version of upscale-zoo; it knows {', '.join(ROUTERS)}"
            )
        modules = {
            name: ModuleLayout(m["in_features"], m["out_features"], tuple(m["ranks"]), m["bias"])
            for name, m in section["modules"].items()
        }
        return cls(section["method"], tuple(section["experts"]), section["router"], modules)

    def to_config(self) -> dict:
        """The section as plain JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "experts": list(self.experts),
            "router": dict(self.router),
            "modules": {name: {**m.__dict__, "ranks": list(m.ranks)} for name, m in self.modules.items()},
        }

    def routing(self) -> Routing:
        """A fresh Routing with the router that the section names."""
        settings = {key: value for key, value in self.router.items() if key != "type"}
        return Routing(self.experts, ROUTERS[self.router["type"]](**settings))


class Experts(nn.Module):
    """The low-rank experts of one linear: ``down`` [R, i], ``up`` [o, R] and, if any bias changed, ``bias`` [E, o]."""

    down: nn.Parameter
    up: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, name: str, layout: ModuleLayout, routing: Routing, *, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.name, self.ranks, self.routing = name, layout.ranks, routing
        self.bias = None
        for tensor, shape in layout.shapes().items():
            setattr(self, tensor, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the experts' part to the base linear's output ``y`` [..., o] for its input ``x`` [..., i]."""
        z = F.linear(x, self.down)
        w = self.routing.weights(self.name, x, z, self.ranks)
        return y + mixture(z, w, self.ranks, self.up, self.bias)


def inject(model: nn.Module, layout: Layout) -> Routing:
    """Attach (uninitialised) experts to the named linears of any model, by forward hooks, and return its Routing.

    The base modules stay as they are, of whatever class (quantised, wrapped by an adapter, Conv1D): they gain a child
    ``experts``, in the model's float format, and a hook that adds its output.
    """
    routing = layout.routing()
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    for name, module_layout in layout.modules.items():
        module = model.get_submodule(name)
        device = next(module.parameters()).device
        module.experts = Experts(name, module_layout, routing, dtype=dtype, device=device)
        module.register_forward_hook(_add_experts)
    watch_blocks(model, layout.modules, routing)
    return routing


def _add_experts(module: Any, args: tuple, y: Tensor) -> Tensor:
    return module.experts(args[0], y)


def watch_blocks(model: nn.Module, modules: Iterable[str], routing: Routing) -> None:
    """Let a router of scope block or model see what enters each decoder block, or the first one.

    The blocks are the module list that the first of ``modules`` (names of upscaled linears) inside one lies in.
    """
    inside = (name.split(".") for name in modules if any(part.isdigit() for part in name.split(".")))
    parts = next(inside, None)
    if routing.router.scope == "linear" or parts is None:
        return
    blocks: Any = model.get_submodule(".".join(parts[: next(n for n, part in enumerate(parts) if part.isdigit())]))
    for block in blocks if routing.router.scope == "block" else blocks[:1]:
        names = tuple(inspect.signature(block.forward).parameters)
        block.register_forward_pre_hook(partial(routing.decide, names), with_kwargs=True)


# ------------------------------------------------------------------------------------------------------- transformers
class UpscaledConfig(PretrainedConfig):
    """``config.json`` of an upscaled checkpoint: the base's own fields, ``base_model_type`` and ``upscale``."""

    model_type = MODEL_TYPE


def upscaled_config(base: Mapping, layout: Layout) -> dict:
    """``config.json`` of an upscaled checkpoint from the base's: loud for whoever does not know the format."""
    architectures = [f"Upscaled{a}" for a in base.get("architectures") or []]
    own = {"model_type": MODEL_TYPE, "base_model_type": base["model_type"], "architectures": architectures}
    return {**base, **own, "auto_map": _AUTO_MAP, "upscale": layout.to_config()}


def base_config(config: Mapping, **kwargs) -> PretrainedConfig:
    """The base's own config object, from an upscaled checkpoint's ``config.json``; ``kwargs`` go to ``from_dict``."""
    fields = {key: value for key, value in config.items() if key not in ("auto_map", "upscale", "base_model_type")}
    fields["model_type"] = config["base_model_type"]
    fields["architectures"] = [a.removeprefix("Upscaled") for a in config.get("architectures") or []]
    return CONFIG_MAPPING[config["base_model_type"]].from_dict(fields, **kwargs)


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
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        path = Path(save_directory) / "config.json"
        fields = json.loads(path.read_text())
        fields["architectures"] = [a.removeprefix("Upscaled") for a in fields["architectures"]]
        path.unlink()
        _expert_tensors(Path(save_directory), self.layout)  # transformers may rename a head, and its experts, on saving
        Path(save_directory, "modeling_upscaled.py").write_bytes(Path(__file__).read_bytes())
        path.write_text(json.dumps(upscaled_config(fields, self.layout), indent=2) + "\n")


class UpscaledForCausalLM:
    """Loads an upscaled checkpoint: the base by its own class and loader, then the experts into the named linears."""

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModelForCausalLM") -> None:
        """Nothing to register: the checkpoint's ``auto_map`` names this class."""

    @classmethod
    def from_pretrained(cls, path, *, config=None, expert: str | None = None, **kwargs):
        """Load from a directory or a Hub id.

        Args:
            path: directory or Hub id (with ``revision``, ``token``, ``cache_dir`` ... as for any model).
            config: ignored; the checkpoint's ``config.json`` is the authority on its layout.
            expert: route every token to this expert ("base" for none) instead of by the router.
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
        layout = Layout.from_config(fields["upscale"])
        tensors = _expert_tensors(Path(path), layout)
        for key in ("trust_remote_code", "revision", "adapter_kwargs", "output_loading_info"):
            kwargs.pop(key, None)
        kwargs["ignore_mismatched_sizes"] = True  # they are refused below, by name
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, config=base_config(fields), output_loading_info=True, **kwargs
            )
        model, info = loaded
        if bad := [*info["missing_keys"], *info["mismatched_keys"]]:
            raise ValueError(f"{path}: base tensors missing or of a wrong shape: {sorted(map(str, bad))[:5]}")
        routing = inject(model, layout)
        with torch.no_grad():
            for name, read in tensors.items():
                model.get_parameter(name).copy_(read())
        routing.forced = routing.one_hot(expert)
        model.__class__ = type(f"Upscaled{type(model).__name__}", (UpscaledModel, type(model)), {})
        model.routing, model.layout = routing, layout
        return model


def _expert_tensors(path: Path, layout: Layout) -> dict[str, Callable[[], Tensor]]:
    """Every expert tensor's name with a function that reads it. Raises ValueError for a missing or misshapen one."""
    index = path / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    shards = [safe_open(path / file, framework="pt") for file in files]
    where = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118 (safe_open has no __iter__)
    tensors = {}
    for module, module_layout in layout.modules.items():
        for tensor, shape in module_layout.shapes().items():
            name = f"{module}.experts.{tensor}"
            if name not in where:
                raise ValueError(f"{path}: tensor {name} is missing; build the checkpoint again")
            if (found := tuple(where[name].get_slice(name).get_shape())) != shape:
                raise ValueError(f"{path}: tensor {name} has shape {found}, config.json says {shape}")
            tensors[name] = lambda shard=where[name], name=name: shard.get_tensor(name)
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
