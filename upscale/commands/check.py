"""`upscale check`: does a group fit together, and can it be built here?"""

import json as json_format
import sys
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from upscale.commands.display import console, quiet_libraries, size
from upscale.commands.options import GivenGroup, group_and_rest, group_options
from zoo.errors import MismatchError, OutputError, ZooError


@click.command()
@click.argument("paths", nargs=-1, metavar="[GROUP]")
@group_options
@click.option("--out", default=".", metavar="DIR", help="Where the result would be written: its disk is looked at.")
@click.option("--json", is_flag=True, help="Print the verdict as JSON, and nothing else.")
def check(paths: tuple[str, ...], given: GivenGroup, out: str, json: bool) -> None:
    """Compare every expert of GROUP with its base, from configurations and headers alone.

    Of models on the Hub no weights are downloaded. Prints one verdict with every mismatch, what the result would take
    (built by `upscale smile` as it is; its --dry-run knows other settings) and the licences; exits with 1 if the group
    cannot be upscaled here.

    \b
    Examples:
      upscale check group.yaml
      upscale check --base base --expert math=ft-math --expert code=org/ft-code@v1
      upscale check group.yaml --vocabulary union --out /big/disk --json
    """
    quiet_libraries()
    try:
        group, _ = group_and_rest(paths, given, rest=0)
        found = _found(group, out)
    except ZooError as error:
        if not json:
            raise
        found = {"ok": False, "mismatches": [str(error)], "warnings": []}
    if json:
        print(json_format.dumps(found, indent=1))
        sys.exit(0 if found["ok"] else 1)
    _show(found)
    if not found["ok"]:
        raise (
            MismatchError(found["mismatches"])
            if not found.get("needs")
            else OutputError("; ".join(found["mismatches"]))
        )
    console.print(f"[green]ok[/] {len(found['models']) - 1} expert(s) fit the base", highlight=False)


def _found(group, out: str) -> dict[str, Any]:
    """The verdict as plain values."""
    import zoo
    from upscale.building.methods import smile
    from upscale.building.needs import needs
    from upscale.building.plan import make_plan
    from upscale.config import SmileConfig
    from zoo.hub.licences import combined, licence_of

    verdict = zoo.check(group)
    sources = {"base": group.base, **group.experts}
    opened = {"base": verdict.base, **verdict.experts}
    licences = {name: licence_of(model.path) for name, model in opened.items()}
    found: dict[str, Any] = {
        "ok": not verdict.mismatches,
        "architecture": verdict.base.config.get("model_type"),
        "mismatches": list(verdict.mismatches),
        "warnings": list(verdict.warnings),
        "models": {name: _model(sources[name], model, licences[name]) for name, model in opened.items()},
        "added_tokens": {str(number): text for number, text in verdict.added.items()},
    }
    try:
        found["licence"] = combined(licences)
    except ZooError as error:
        found["licence"] = None
        if any(licences.values()):
            found["warnings"].append(str(error))
    if len(set(licences.values())) > 1 and found["licence"]:
        found["warnings"].append(f"licences differ; the result's is {found['licence']}, the strictest of them")
    if not verdict.mismatches:
        try:
            wanted = needs(make_plan(verdict, smile, SmileConfig()), out)
            found["needs"] = {**vars(wanted), "base": verdict.base.nbytes}
            found["mismatches"] += wanted.missing
        except ZooError as error:
            found["mismatches"].append(str(error))
        found["ok"] = not found["mismatches"]
    return found


def _model(source, model, licence: str | None) -> dict[str, Any]:
    from zoo.reading.adapter import Adapter
    from zoo.reading.aligning import View
    from zoo.reading.tied import HEAD

    own = model.model if isinstance(model, View) else model
    stored = own.stored if isinstance(own, Adapter) else own.tensors
    return {
        "source": str(source),
        "revision": None if source.is_local else model.path.name,
        "kind": "LoRA" if isinstance(own, Adapter) else "full",
        "architecture": own.config.get("model_type"),
        "tensors": len(stored),
        "formats": sorted({str(spec.dtype).removeprefix("torch.") for spec in stored.values()}),
        "bytes": own.nbytes,
        "tied": HEAD not in own.tensors or bool(own.config.get("tie_word_embeddings")),
        "licence": licence,
    }


def _show(found: dict[str, Any]) -> None:
    table = Table(title=f"Group of {found['architecture']}", title_justify="left")
    for column in ("model", "source", "kind", "tensors", "format", "size", "licence"):
        table.add_column(column, overflow="fold")
    for name, model in found["models"].items():
        source = model["source"] if model["revision"] is None else f"{model['source']} ({model['revision'][:8]})"
        formats, licence = ", ".join(model["formats"]), model["licence"] or "not said"
        cells = (escape(source), model["kind"], str(model["tensors"]), formats, size(model["bytes"]), escape(licence))
        table.add_row(name, *cells)
    console.print(table)
    for warning in found["warnings"]:
        console.print(f"[yellow]warning[/] {escape(warning)}", highlight=False, soft_wrap=True)
    if tokens := found["added_tokens"]:
        shown = ", ".join(f"{text} ({number})" for number, text in list(tokens.items())[:8])
        console.print(f"tokens     {len(tokens)} beyond the base's: {escape(shown)}", highlight=False, soft_wrap=True)
    if wanted := found.get("needs"):
        ratio = wanted["disk"] / wanted["base"]
        free = "" if wanted["memory_free"] is None else f", {size(wanted['memory_free'])} free"
        console.print(f"size       at most {size(wanted['disk'])}, {ratio:.2f}x the base", highlight=False)
        console.print(f"disk       {size(wanted['disk_free'])} free", highlight=False)
        console.print(f"memory     about {size(wanted['memory'])} at the peak{free}", highlight=False)
