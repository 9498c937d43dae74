"""`upscale verify`: is a checkpoint what it should be?"""

import json
import os
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from upscale.commands.display import console, progress_bar, quiet_libraries, shade
from upscale.commands.options import pickle_option, settings
from upscale.config import VerifyConfig
from upscale.errors import ConfigError

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "dim"}
_SHOWN = 5  # problems of a check


@click.command()
@click.argument("path", metavar="OUT")
@click.option("--against", metavar="GROUP", help="Measure each expert against the models that OUT was built from.")
@pickle_option
@settings(VerifyConfig)
@click.option("--json", "json_file", metavar="FILE", help="Write the report here too, with every problem.")
def verify(path: str, against: str | None, allow_pickle: bool, json_file: str | None, **options) -> None:
    """Check that OUT, a directory or a Hub id, is what it should be; exits with 1 if it is not.

    That all files and tensors are there, with the bytes that were written, finite, the factors orthonormal; that
    config.json, the tensors, the base and the recipe fit together; that it loads in transformers and in vLLM, which say
    the same of some texts; and against its sources, that it keeps of each expert what the report says.

    \b
    Examples:
      upscale verify out
      upscale verify out --engine none
      upscale verify org/name@v1 --against group.yaml --json report.json
    """
    from dataclasses import replace

    from upscale.verifying.verify import verify as run
    from zoo import Group

    config = VerifyConfig(**options)
    group = None if against is None else replace(Group.load(against), allow_pickle=allow_pickle)
    if json_file is not None and (
        Path(json_file).is_dir() or not os.access(Path(json_file).absolute().parent, os.W_OK)
    ):
        raise ConfigError(f"--json {json_file}: no file can be written there")
    quiet_libraries()
    with progress_bar("verifying") as progress:
        found = run(path, group, config, progress=progress)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    _show(found)
    if not found.ok:
        count = len(found.problems)
        told = f"{count} problem{'s' * (count > 1)}; fetch it or build it again"
        console.print(f"[red]failed[/] {escape(path)}: {told}", highlight=False, soft_wrap=True)
        raise click.exceptions.Exit(1)
    console.print(f"[green]ok[/] {escape(path)}", highlight=False, soft_wrap=True)


def _show(found) -> None:
    table = Table(title="Checks", title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("what was found")
    for finding in found.findings:
        lines = list(finding.problems[:_SHOWN])
        if (more := len(finding.problems) - _SHOWN) > 0:
            lines.append(f"and {more} more")
        told = "\n".join(lines) or finding.detail
        table.add_row(finding.check, f"[{_COLOURS[finding.status]}]{finding.status}[/]", escape(told))
    console.print(table)
    if not found.experts:
        return
    table = Table(title="Experts against their sources", title_justify="left")
    for column in ("expert", "energy kept", "reported", "least kept in", "missing there"):
        table.add_column(column, justify="left" if column in ("expert", "least kept in") else "right")
    for name, own in found.experts.items():
        reported = "" if own.reported is None else f"{own.reported:.2%}"
        tensor, missing = own.worst
        table.add_row(name, shade(own.energy, f"{own.energy:.2%}"), reported, escape(tensor), f"{missing:.2%}")
    console.print(table)
