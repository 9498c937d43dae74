"""The model card that a checkpoint carries as ``README.md``."""

from upscale.building.report import Report
from zoo import Group, Source

_TEXT = """---
library_name: transformers
{task}tags: [merge, moe, {method}, upscale-zoo]
{parents}---
# {title}

One model made of a base and {count} fine-tunes of it by `{method}` upscaling (upscale-zoo): {summary}

| expert | source | energy kept in the linears |
|---|---|---|
{rows}

Base: `{base}`. Size: {size:.2f}x the base; the base and all its fine-tunes are {group:.2f}x.

```python
import upscale                                              # pip install upscale-zoo
model = upscale.load("THIS_MODEL")                          # upscale.load("THIS_MODEL", expert="{first}") forces one

from transformers import {auto}               # without the package
model = {auto}.from_pretrained("THIS_MODEL", trust_remote_code=True)
```
{serve}"""
_SERVE = """```sh
vllm serve THIS_MODEL                                       # pip install upscale-zoo beside vLLM
```
"""
_CAUSAL = "AutoModelForCausalLM"


def card(group: Group, report: Report, summary: str, auto: str) -> str:
    """Markdown for a model made from ``group``.

    Args:
        group: what it was made from.
        report: what was measured.
        summary: what the method does, a sentence.
        auto: the Auto class of transformers that loads it.
    """
    hub = [s.location for s in (group.base, *group.experts.values()) if not s.is_local]
    parents = "base_model:\n" + "".join(f"- {name}\n" for name in hub) + "base_model_relation: merge\n" if hub else ""
    energy = report.energy
    rows = "\n".join(f"| {e} | `{_name(s)}` | {energy.get(e, 1.0):.1%} |" for e, s in group.experts.items())
    return _TEXT.format(
        method=report.method,
        summary=summary,
        auto=auto,
        task="pipeline_tag: text-generation\n" if auto == _CAUSAL else "",
        serve=_SERVE if auto == _CAUSAL else "",
        parents=parents,
        title=f"{_name(group.base)} + {', '.join(group.experts)}",
        count=len(group.experts),
        rows=rows,
        base=_name(group.base),
        size=report.result_bytes / report.base_bytes,
        group=report.group_bytes / report.base_bytes,
        first=next(iter(group.experts)),
    )


def _name(source: Source) -> str:
    """A Hub id as it is; of a local path the last part alone, since a card is for others to read."""
    return source.location.rstrip("/").rsplit("/", 1)[-1] if source.is_local else str(source)
