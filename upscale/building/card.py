"""The model card that a checkpoint carries as ``README.md``."""

from upscale.building.report import Report
from zoo import Group, Source

_TEXT = """---
library_name: transformers
pipeline_tag: text-generation
tags: [merge, moe, {method}, upscale-zoo]
{parents}---
# {title}

One model made of a base and {count} fine-tunes of it by `{method}` upscaling (upscale-zoo): every linear that a
fine-tune changed keeps the change as a low-rank expert, and a router chooses among them for each token.

| expert | source | energy kept in the linears |
|---|---|---|
{rows}

Base: `{base}`. Size: {size:.2f}x the base; the base and all its fine-tunes are {group:.2f}x.

```python
import upscale                                              # pip install upscale-zoo
model = upscale.load("THIS_MODEL")                          # upscale.load("THIS_MODEL", expert="{first}") forces one

from transformers import AutoModelForCausalLM               # without the package
model = AutoModelForCausalLM.from_pretrained("THIS_MODEL", trust_remote_code=True)
```
```sh
vllm serve THIS_MODEL                                       # pip install upscale-zoo beside vLLM
```
"""


def card(group: Group, report: Report) -> str:
    """Markdown for a model made from ``group``, with what ``report`` measured."""
    hub = [s.location for s in (group.base, *group.experts.values()) if not s.is_local]
    parents = "base_model:\n" + "".join(f"- {name}\n" for name in hub) + "base_model_relation: merge\n" if hub else ""
    energy = report.energy
    rows = "\n".join(f"| {e} | `{_name(s)}` | {energy.get(e, 1.0):.1%} |" for e, s in group.experts.items())
    return _TEXT.format(
        method=report.method,
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
