"""The model card that a checkpoint carries as ``README.md``, from what its own files say."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from upscale.building.methods import smile, wemoe
from upscale.evaluating.entrants import MERGES, ORACLE
from upscale.evaluating.results import BASE, Result
from upscale.evaluating.scoreboard import to_markdown
from upscale.publishing.sources import Origin, origins
from upscale.runtime.architecture_upscaled import autos_of
from zoo.errors import LicenceError
from zoo.hub.licences import combined, front_matter

MADE = "<!-- Written by upscale-zoo, and anew with each push; remove this line to keep the card as it is. -->"
_SUMMARIES = {method.NAME: " ".join(method.SUMMARY.split()) for method in (smile, wemoe)}
_CAUSAL = "AutoModelForCausalLM"
_TAGS = {  # the Hub's name of what a model does, by the class that loads it
    _CAUSAL: "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
}
_ROUTERS = {
    "projection": "In each module, a token goes to the expert whose leading directions see most of it.",
    "calibrated": "A small classifier, fitted to example prompts of each expert, reads the prompt and decides for all "
    "modules and for the whole answer.",
    "ensembling": "Small networks read what enters each block and weigh the experts, token by token.",
}
_USE = """```python
import upscale  # pip install upscale-zoo

model = upscale.load("{name}")  # or upscale.load("{name}", expert="{first}")
```

```python
from transformers import {auto}  # no other package

model = {auto}.from_pretrained("{name}", trust_remote_code=True)
```
"""
_SERVE = """

```sh
vllm serve {name}  # pip install upscale-zoo beside vLLM
```
"""
_LIMITS = """- An expert is not its fine-tune: {kept}
- The router can send a prompt to the wrong expert. Naming the expert, where a task is known, avoids that.
- Nothing was trained on all skills together: a prompt that needs two of them gets no more than the experts know.
- Biases and gaps of the base and of each fine-tune are still there; see their cards.
- `trust_remote_code=True` runs the Python files of this repository. They are copies of upscale-zoo's own.
"""


def card(
    config: Mapping[str, Any],
    recipe: Mapping[str, Any],
    report: Mapping[str, Any],
    *,
    name: str = "THIS_MODEL",
    licence: str | None = None,
    results: Sequence[Result] = (),
    plots: Sequence[str] = (),
) -> str:
    """Markdown with the Hub's metadata for an upscaled checkpoint.

    Args:
        config: its ``config.json``.
        recipe: its ``upscale.yaml``.
        report: its ``report.json``; of an imported model it may be empty.
        name: what it is loaded by, the Hub's ``org/name``.
        licence: of the whole; None for the most restrictive of the sources', left out where there is none.
        results: of an evaluation.
        plots: names of pictures beside the card.
    """
    section, auto = config["upscale"], autos_of(config)[0]
    experts, base, *tunes = section["experts"], *origins(recipe)
    title = name if name.count("/") == 1 else f"{base.name} + {', '.join(experts)}"
    parts = [
        f"# {title.rpartition('/')[2]}",
        f"{_opening(base, len(experts), section['method'], recipe)}: {_SUMMARIES[section['method']]}",
        "## Use\n\n"
        + _USE.format(name=name, first=experts[0], auto=auto).strip()
        + (_SERVE.format(name=name) if auto == _CAUSAL else "").rstrip(),
        "## Experts\n\n" + _table([base, *tunes], report.get("energy", {})),
    ]
    if report:
        parts.append(_sizes(report))
    parts.append("## Routing\n\n" + " ".join([_ROUTERS[section["router"]["type"]], *_pictures(plots)]))
    if results:
        parts.append("## Evaluation\n\n" + to_markdown(results).strip())
    parts += ["## Limits\n\n" + _LIMITS.format(kept=_kept(report)).strip(), MADE]
    data = _metadata(title, auto, section["method"], [base, *tunes], licence, results, experts)
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _opening(base: Origin, experts: int, method: str, recipe: Mapping[str, Any]) -> str:
    version, upscaling = f"upscale-zoo {recipe.get('upscale_zoo', '')}", f"{method.upper()} upscaling"
    if "imported" in recipe:
        return f"`{base.name}`, a base and {experts} of its fine-tunes by {upscaling}, converted by {version}"
    return (
        f"One model made of `{base.name}` and {experts} fine-tune{'s' * (experts > 1)} of it by {upscaling} ({version})"
    )


def _metadata(
    title: str,
    auto: str,
    method: str,
    sources: Sequence[Origin],
    licence: str | None,
    results: Sequence[Result],
    experts: Sequence[str],
) -> ModelCardData:
    if licence is None:
        try:
            licence = combined({source.role: source.licence for source in sources})
        except LicenceError:
            licence = None  # to be said when it is pushed
    parents = list(dict.fromkeys(source.hub_id for source in sources if source.hub_id is not None))
    scores = _scores(results, experts, _TAGS.get(auto, "other"))
    said = front_matter(licence)
    return ModelCardData(
        license=said.get("license"),
        license_name=said.get("license_name"),
        base_model=parents or None,
        base_model_relation="merge" if parents else None,
        library_name="transformers",
        pipeline_tag=_TAGS.get(auto),
        tags=["merge", "moe", method, "upscale-zoo"],
        model_name=title if scores else None,
        eval_results=scores or None,
    )


def _scores(results: Sequence[Result], experts: Sequence[str], task: str) -> list[EvalResult]:
    """Of the upscaled model, if one of those that took part must be it."""
    others = {BASE, *experts, *MERGES}
    own = dict.fromkeys(r.model for r in results if r.model not in others and not r.model.endswith(ORACLE))
    return [
        EvalResult(
            task_type=task,
            dataset_type=r.task,
            dataset_name=r.task,
            metric_type=r.metric,
            metric_value=round(r.score, 4),
        )
        for r in results
        if len(own) == 1 and r.model in own
    ]


def _table(sources: Sequence[Origin], energy: Mapping[str, float]) -> str:
    rows = [["", "model", "revision", "licence", "energy kept"], ["---", "---", "---", "---", "---:"]]
    for source in sources:
        kept = f"{energy[source.role]:.1%}" if source.role in energy else ""
        link = f"[{source.name}](https://huggingface.co/{source.hub_id})" if source.hub_id else source.name
        rows.append([source.role, link, f"`{source.version}`" * bool(source.version), source.licence or "", kept])
    note = "Energy kept: part of the squared norm of the fine-tune's changes that its expert holds, in the linears."
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + (f"\n\n{note}" if energy else "")


def _sizes(report: Mapping[str, Any]) -> str:
    base, group, whole = (report[f"{what}_bytes"] for what in ("base", "group", "result"))
    return (
        f"Size: {_megabytes(whole)}, {whole / base:.2f}x the base; "
        f"the base and all its fine-tunes are {_megabytes(group)}, {group / base:.2f}x."
    )


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _pictures(plots: Sequence[str]) -> list[str]:
    return [f"\n\n![{name.rpartition('.')[0]}]({name})" for name in sorted(plots)]


def _kept(report: Mapping[str, Any]) -> str:
    energy = report.get("energy", {})
    if not energy:
        return "it keeps a part of what the fine-tune changed."
    return f"it keeps {min(energy.values()):.0%} or more of what the fine-tune changed in the linears, as in the table."
