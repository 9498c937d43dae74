"""The `upscale` command: finds its subcommands by name, and turns errors into one clear line."""

import os
import signal
import sys
from importlib import import_module
from importlib.metadata import entry_points

import click

from zoo.errors import MismatchError, ZooError

# One file a verb. `serve` and `demo` need vLLM, so they live in `serving` and are found by entry point.
_COMMANDS = {
    "adapt": "upscale.commands.adapt:adapt",
    "add": "upscale.commands.add:add",
    "calibrate": "upscale.commands.calibrate:calibrate",
    "check": "upscale.commands.check:check",
    "eval": "upscale.commands.eval:evaluate",
    "extract": "upscale.commands.extract:extract",
    "import": "upscale.commands.import_:import_",
    "list": "upscale.commands.list:list_",
    "pull": "upscale.commands.pull:pull",
    "push": "upscale.commands.push:push",
    "rebuild": "upscale.commands.rebuild:rebuild",
    "remove": "upscale.commands.remove:remove",
    "recipes": "upscale.commands.recipes:recipes",
    "route": "upscale.commands.route:route",
    "smile": "upscale.commands.smile:smile",
    "spectra": "upscale.commands.spectra:spectra",
    "verify": "upscale.commands.verify:verify",
    "wemoe": "upscale.commands.wemoe:wemoe",
}


class _Commands(click.Group):
    """Loads a subcommand when it is asked for, and shows a user's errors as one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*_COMMANDS, *(point.name for point in entry_points(group="upscale.commands"))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _COMMANDS:
            module, _, name = _COMMANDS[cmd_name].partition(":")
            return getattr(import_module(module), name)
        return next((p.load() for p in entry_points(group="upscale.commands", name=cmd_name)), None)

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except BaseException as error:
            if (number := ctx.meta.get("signal")) is not None:  # native code may have made any error of it
                word = "Interrupted" if number == signal.SIGINT else "Terminated"
                click.echo(f"{word}; {ctx.meta.get('left', 'nothing unfinished was left behind')}.", err=True)
                sys.exit(128 + number)
            if isinstance(error, MismatchError):
                lines = ["the group does not fit together:", *error.mismatches]
                raise click.ClickException("\n  ".join(lines)) from error
            if isinstance(error, ZooError):
                raise click.ClickException(str(error)) from error
            if isinstance(error, Exception) and not isinstance(error, click.ClickException | click.exceptions.Exit):
                if os.environ.get("UPSCALE_TRACEBACK"):
                    raise
                what = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise click.ClickException(f"{what} (UPSCALE_TRACEBACK=1 shows where)") from error
            raise


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="upscale-zoo", prog_name="upscale")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Turn a zoo of fine-tuned models into one model that keeps every skill, and serve it.

    A GROUP is a YAML file with `base: MODEL` and `experts:` with one `name: MODEL` a line; or give it inline with
    --base MODEL --expert NAME=MODEL --expert NAME=MODEL. A MODEL is a directory or a Hub id, org/name@revision.
    """

    def stop(number: int, _) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):  # what is unfinished is being removed
            signal.signal(each, signal.SIG_IGN)
        ctx.meta["signal"] = number
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):  # a polite kill cleans up like Ctrl-C does
        signal.signal(number, stop)


if __name__ == "__main__":
    main()
