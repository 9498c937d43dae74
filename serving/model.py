"""vLLM model classes, one per architecture, made on demand: the base's own class plus the experts."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import PPMissingLayer

from serving.compat import batched, check_version, forget_residual, hand_over_weights, renamed
from serving.mixture import Part, attach, carry, may_be_reordered, rows_as_loaded
from serving.plugin import PREFIX
from serving.prefix import AttentionMean, attention_like
from serving.prompts import PromptWeights, by_prompt, forced_expert
from upscale.runtime.layout_upscaled import EMBEDDING, LINEAR, Layout
from upscale.runtime.mixture_upscaled import EmbeddingExperts, NormExperts
from upscale.runtime.modeling_upscaled import watch
from upscale.runtime.routers_upscaled import make_router
from upscale.runtime.routing_upscaled import Routing

_OTHER_ROUTER = re.compile(r"router\.[0-9a-f]{8}\.")  # of a calibration that is being replaced
# What vLLM's classes call their fused linears, also those that do not say what they fuse.
_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
Loaders = dict[str, list[tuple[str, Callable[[Tensor], str]]]]  # by tensor: (module, copies it and names the parameter)


class BatchedRouting(Routing):
    """The Routing of a model whose tensors are [1, T, ...]."""

    def weights(self, name: str, y: Tensor, *args, **kwargs) -> Tensor:
        """See ``Routing.weights``."""
        if self.forced is None and self.given is not None and y.ndim > 2:
            return self.given[: y.shape[1]].unsqueeze(0)
        return super().weights(name, y, *args, **kwargs)


class UpscaledModel(nn.Module):
    """Mixed in before a vLLM model class: attaches the experts after construction and loads their tensors."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        check_version()
        config = vllm_config.model_config.hf_config
        ours = config.architectures
        config.architectures = [name.removeprefix(PREFIX) for name in ours or []]  # which some classes go by
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config.architectures = ours
        layout = Layout.from_config(config.upscale)
        self.router = make_router(layout.modules, layout.router)
        self.routing = (BatchedRouting if batched(self) else Routing)(layout.experts, self.router)
        forced = self.routing.one_hot(forced_expert(vllm_config))
        self.routing.forced = None if forced is None else forced.to(next(self.parameters()).device)
        located = _located(self, layout)
        if self.routing.forced is None:
            self._follow(located, vllm_config, prefix)
        self._loaders: Loaders = {}
        for name in self.router.shapes():
            stored = f"{layout.router['tensors']}.{name}"
            self._loaders[stored] = [("router", lambda t, n=name: _copy(self.router, n, t))]
        self._attach(located, vllm_config.model_config.dtype)

    def _follow(self, located: dict[str, list[Part]], vllm_config: VllmConfig, prefix: str) -> None:
        """Give the router what it needs to decide: whole prompts, or means over prefixes and what it watches."""
        if by_prompt(vllm_config.model_config.hf_config.upscale):
            tokens = vllm_config.scheduler_config.max_num_batched_tokens
            self.prompt_weights = PromptWeights(tokens, len(self.routing.experts))
            self.routing.given = self.prompt_weights.tensor
            hand_over_weights(self, self.prompt_weights)
            return
        # A layer's name must hold one number, which tells the engine where in the model it is.
        sites = list(self.router.sites.items())
        like = attention_like(self) if sites else None
        self.means = nn.ModuleList(
            AttentionMean(like, width, self.router.half_life, f"{prefix}upscale_means.layers.{n}")
            for n, (_, width) in enumerate(sites)
        )
        by_site = {site: mean for (site, _), mean in zip(sites, self.means, strict=True)}
        dtype = vllm_config.model_config.dtype
        self.router.mean = lambda site, values: by_site[site](values.flatten(0, -2), self.router.positions, dtype).view(
            values.shape
        )
        if self.router.shared:
            for block in self.modules():
                forget_residual(block)
            embedding = next(m for m in self.modules() if isinstance(m, VocabParallelEmbedding))
            watch(self, embedding, list(located), self.router)

    def _attach(self, located: dict[str, list[Part]], dtype) -> None:
        """Hang the experts on their modules and note how each of their tensors is loaded."""
        self._carries = False
        device = next(self.parameters()).device
        for path, parts in located.items():
            module: Any = self.get_submodule(path)
            if linears := [part for part in parts if part.layout.kind == LINEAR]:
                mixture = attach(module, linears, self.routing)
                self._carries = self._carries or mixture.carries
                for tensor, load in mixture.loaders().items():
                    self._loaders.setdefault(tensor, []).append((f"{path}.mixture", load))
            for part in parts:
                if part.layout.kind == LINEAR:
                    continue
                layer = EmbeddingExperts if part.layout.kind == EMBEDDING else NormExperts
                module.experts = layer(part.name, part.layout, self.routing, dtype=dtype, device=device)
                module.register_forward_hook(_add_experts)
                for name in part.layout.shapes():
                    load = partial(_copy, module.experts, name)
                    self._loaders.setdefault(f"{part.name}.experts.{name}", []).append((f"{path}.experts", load))

    def forward(self, input_ids, positions, *args, **kwargs):
        """A pass of the base's class; where a head needs them, weights go on behind the hidden states."""
        self.router.start()
        self.router.positions = positions
        hidden = super().forward(input_ids, positions, *args, **kwargs)
        return carry(hidden, self.routing) if self._carries and isinstance(hidden, Tensor) else hidden

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the experts' tensors here and hand all others to the base's class. Returns the parameters loaded."""
        load_base: Callable = super().load_weights  # type: ignore[misc]
        loaded, missing = set(), set(self._loaders)
        upscaled: list[Any] = [module for module in self.modules() if hasattr(module, "mixture")]
        fused = {linear.mixture.parts[0].name: linear for linear in upscaled if may_be_reordered(linear)}
        held: list[tuple[str, Tensor]] = []  # until the order of their rows is known

        def take(name: str, tensor: Tensor) -> None:
            loaded.update(f"{path}.{load(tensor)}" for path, load in self._loaders[name])
            missing.discard(name)

        def others():
            for name, tensor in weights:
                if name in self._loaders:
                    held.append((name, tensor)) if name.split(".experts.")[0] in fused else take(name, tensor)
                elif not _OTHER_ROUTER.match(name):
                    for part in [part for part in fused if f".{part}.weight".endswith(f".{name}")]:
                        rows = rows_as_loaded(load_base, fused[part], name, tensor.shape)
                        fused[part].mixture.rows = [[rows]]
                    yield name, tensor

        loaded |= load_base(others()) or set()
        for name, tensor in held:
            take(name, tensor)
        if missing:
            raise ValueError(f"tensors of experts or router are missing: {sorted(missing)[:3]}; build them again")
        return loaded


def _copy(module: nn.Module, name: str, tensor: Tensor) -> str:
    module.get_parameter(name).data.copy_(tensor)
    return name


def _add_experts(module: Any, args: tuple, output: Any) -> Any:
    """Change what a module returns; vLLM's norms may return the residual beside it."""
    if isinstance(output, tuple):
        return (module.experts(args, output[0]), *output[1:])
    return module.experts(args, output)


def _located(model: nn.Module, layout: Layout) -> dict[str, list[Part]]:
    """The upscaled linears by the vLLM module that holds them; those of other pipeline stages are left out."""
    packed = {**_FUSED, **getattr(model, "packed_modules_mapping", {})}
    modules = dict(model.named_modules())
    found: dict[str, list[Part]] = {}
    for name, module_layout in layout.modules.items():
        path = renamed(model, name)
        parent, _, leaf = path.rpartition(".")
        index = None
        if path not in modules:
            fused = next((f for f, leaves in packed.items() if leaf in leaves and f"{parent}.{f}" in modules), None)
            if fused is not None:
                path, index = f"{parent}.{fused}", packed[fused].index(leaf)
            elif not parent and module_layout.kind == LINEAR:  # a class without a module for a tied head
                path = next(path for path, module in modules.items() if isinstance(module, VocabParallelEmbedding))
            elif _elsewhere(modules, path):
                continue
            else:
                raise ValueError(f"{name} has no counterpart in vLLM's {type(model).__mro__[2].__name__}")
        if isinstance(modules[path], PPMissingLayer):
            continue
        found.setdefault(path, []).append(Part(name, module_layout, index))
    return found


def _elsewhere(modules: dict[str, nn.Module], path: str) -> bool:
    """Whether a module lies inside a layer that another pipeline stage holds."""
    parts = path.split(".")
    return any(isinstance(modules.get(".".join(parts[:n])), PPMissingLayer) for n in range(1, len(parts)))


def __getattr__(name: str) -> type:
    """Make ``Upscaled<Architecture>`` when vLLM asks for it."""
    architecture = name.removeprefix(PREFIX)
    if architecture == name or architecture not in ModelRegistry.models:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = ModelRegistry.models[architecture].load_model_cls()
    made = type(name, (UpscaledModel, base), {"__module__": __name__})
    globals()[name] = made
    return made
