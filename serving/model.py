"""vLLM model classes, one per architecture, made on demand: the base's own class plus the experts."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.utils import PPMissingLayer

from serving.compat import check_version, renamed
from serving.mixture import Part, attach
from serving.plugin import PREFIX
from upscale.modeling_upscaled import Layout, Routing, watch_blocks


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
        additional = vllm_config.additional_config
        options = additional.get("upscale", {}) if isinstance(additional, dict) else {}
        routing = layout.routing()
        forced = routing.one_hot(options.get("expert"))
        routing.forced = None if forced is None else forced.to(next(self.parameters()).device)
        self._expert_loaders: dict[str, tuple[str, Callable[[Tensor], str]]] = {}
        located = _located(self, layout)
        _check_scope(self, located, routing)
        watch_blocks(self, located, routing)
        for path, parts in located.items():
            mixture = attach(self.get_submodule(path), parts, routing)
            for tensor, load in mixture.loaders().items():
                self._expert_loaders[tensor] = (f"{path}.mixture", load)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the experts' tensors here and hand all others to the base's class. Returns the parameters loaded."""
        loaded, missing = set(), set(self._expert_loaders)

        def others():
            for name, tensor in weights:
                if name in self._expert_loaders:
                    path, load = self._expert_loaders[name]
                    loaded.add(f"{path}.{load(tensor)}")
                    missing.discard(name)
                else:
                    yield name, tensor

        loaded |= super().load_weights(others()) or set()  # type: ignore[misc]
        if missing:
            raise ValueError(f"expert tensors are missing: {sorted(missing)[:3]}; build the checkpoint again")
        return loaded


def _located(model: nn.Module, layout: Layout) -> dict[str, list[Part]]:
    """The upscaled linears by the vLLM module that holds them; those of other pipeline stages are left out."""
    packed = getattr(model, "packed_modules_mapping", {})
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
            elif not parent:  # some classes have no module for a head that is tied to the embeddings
                path = next(path for path, module in modules.items() if isinstance(module, VocabParallelEmbedding))
            elif _elsewhere(modules, path):
                continue
            else:
                raise ValueError(f"{name} has no counterpart in vLLM's {type(model).__mro__[2].__name__}")
        if isinstance(modules[path], PPMissingLayer):
            continue
        found.setdefault(path, []).append(Part(name, module_layout, index))
    return found


def _check_scope(model: nn.Module, located: Iterable[str], routing: Routing) -> None:
    """vLLM computes logits apart from the blocks, for some tokens only: what was decided for all does not fit there."""
    heads = [path for path in located if isinstance(model.get_submodule(path), VocabParallelEmbedding)]
    if heads and routing.router.scope != "linear":
        raise ValueError(f"{heads[0]}: vLLM routes an output head by its own input only, not by block or model")


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
