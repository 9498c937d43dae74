"""The model cards of what is taken out of an upscaled checkpoint."""

from collections.abc import Mapping

from huggingface_hub import ModelCardData

from upscale.building.stored import Stored
from upscale.building.stored_expert import StoredExpert
from upscale.publishing.sources import Origin, origins
from upscale.runtime.architecture_upscaled import autos_of

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has buffers for

_MODEL = """
# {title}

`{expert}` of an upscaled model (upscale-zoo), as a model of its own: it computes what the upscaled model computes when
it is forced to `{expert}`.

{sources}
"""
_ADAPTER = """
# {title}

Expert `{expert}` of an upscaled model (upscale-zoo), as a LoRA adapter of rank {rank} at most, with a scaling of 1.

{sources}

```python
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "THIS_ADAPTER")
```

```sh
vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules {expert}=THIS_ADAPTER
```

{left_out}
"""


def model_card(stored: Stored, name: str) -> str:
    """Markdown for an expert, or the base, that was written as a model."""
    base, own = _origins(stored, name)
    data = ModelCardData(library_name="transformers", tags=["upscale-zoo"], base_model=_parents(base, own))
    text = _MODEL.format(title=_title(name, base), expert=name, sources=_sources(base, own))
    return f"---\n{data.to_yaml()}\n---\n{text}"


def adapter_card(expert: StoredExpert, rank: int, left_out: Mapping[str, float]) -> str:
    """Markdown for an expert that was written as a LoRA of this rank; ``left_out`` are norms by tensor."""
    base, own = _origins(expert.stored, expert.name)
    data = ModelCardData(library_name="peft", tags=["lora", "upscale-zoo"], base_model=base and base.hub_id)
    rows = "".join(f"| `{name}` | {norm:.4g} |\n" for name, norm in left_out.items())
    lost = (
        f"Not in it, since a LoRA cannot hold it:\n\n| tensor | norm of its change |\n|---|---:|\n{rows}"
        if rows
        else ""
    )
    text = _ADAPTER.format(
        title=_title(expert.name, base),
        expert=expert.name,
        rank=rank,
        most=next((most for most in _RANKS if most >= rank), rank),
        auto=autos_of(expert.config)[0],
        base=(base.hub_id or base.name) if base else "BASE",
        sources=_sources(base, own),
        left_out=lost,
    )
    return f"---\n{data.to_yaml()}\n---\n{text.rstrip()}\n"


def _origins(stored: Stored, name: str) -> tuple[Origin | None, Origin | None]:
    """The base and the source of an expert, as far as the recipe names them."""
    recipe = stored.recipe
    if not stored.source or not isinstance(recipe.get("experts"), dict):
        return None, None
    known = {origin.role: origin for origin in origins(recipe)}
    return known.pop("base"), known.get(name)


def _parents(*sources: Origin | None) -> list[str] | None:
    return [source.hub_id for source in sources if source is not None and source.hub_id] or None


def _title(name: str, base: Origin | None) -> str:
    return f"{base.name} + {name}" if base else name


def _sources(base: Origin | None, own: Origin | None) -> str:
    named = {"Base": base, "Fine-tune": own}
    return "\n".join(
        f"{what}: `{source.hub_id or source.name}`{f' at {source.version}' if source.version else ''}."
        for what, source in named.items()
        if source is not None
    )
