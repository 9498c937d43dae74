"""``upscale serve``: vLLM's own OpenAI-compatible server, started with good defaults."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import click

from upscale.errors import ConfigError, EngineError
from zoo import Source

_COMPILATION_FLAGS = {
    "--enforce-eager",
    "--no-enforce-eager",
    "--compilation-config",
    "--optimization-level",
    "-O",
    "-cc",
}
_INSTALL = "pip install 'upscale-zoo[gpu]' (CUDA) or 'upscale-zoo[cpu]'"


def require_vllm() -> None:
    """Raises EngineError, with the remedy, if vLLM is not installed or is a version that is not supported."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(f"vLLM is not installed; {_INSTALL}")
    from serving.compat import check_version

    try:
        check_version()
    except RuntimeError as error:
        raise EngineError(str(error)) from error


def on_cpu() -> bool:
    """Whether vLLM will run on the CPU here."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def engine_defaults(fields: dict) -> dict:
    """Engine options for a model with this ``config.json``; whoever starts an engine may override each.

    - ``dtype`` as stored: vLLM's own "auto" would run a float32 checkpoint in 16 bits, and answer differently.
    - On a CPU, no compilation, which takes a minute and gains little there, and a KV cache of 2 GiB, where vLLM's
      default takes half of the memory. On a GPU vLLM's own defaults are right.
    """
    options = {"dtype": fields.get("dtype") or fields.get("torch_dtype") or "auto"}
    if on_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
        options["enforce_eager"] = True
    return options


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": False})
@click.argument("model", metavar="OUT")
@click.argument("vllm_flags", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM FLAGS]...")
@click.option("--expert", metavar="NAME", help="Route every token to this expert ('base' for none).")
def serve(model: str, vllm_flags: tuple[str, ...], expert: str | None) -> None:
    """Serve a checkpoint with vLLM behind an OpenAI-compatible endpoint.

    Takes every flag of `vllm serve`; the model is served under its directory's name unless
    --served-model-name says otherwise.

    \b
    Examples:
      upscale serve out
      upscale serve out --port 8123 --max-model-len 4096
      upscale serve out --expert math
    """
    Source.parse(model)  # a directory or a Hub id, or one clear line before vLLM takes a minute to say so
    require_vllm()
    command = server_command(model, list(vllm_flags), expert)
    os.execv(command[0], command)


def server_command(model: str, flags: list[str], expert: str | None = None) -> list[str]:
    """The command line of vLLM's server, with defaults for whatever ``flags`` leave open.

    Raises:
        ConfigError: a directory that is no finished model, or an expert that it has not.
    """
    path = Path(model)
    fields = read_fields(path) if path.is_dir() else {}
    given = {flag.split("=")[0] for flag in flags}
    defaults = engine_defaults(fields)
    if not given & {"--served-model-name"}:
        flags = [*flags, "--served-model-name", path.resolve().name if path.is_dir() else model]
    if "--dtype" not in given:
        flags = [*flags, "--dtype", defaults["dtype"]]
    if "enforce_eager" in defaults and not given & _COMPILATION_FLAGS:
        flags = [*flags, "--enforce-eager"]
    if expert is not None:
        if "--additional-config" in given:
            raise ConfigError("--expert and --additional-config exclude each other; put the expert in the latter")
        names = [*fields.get("upscale", {}).get("experts", []), "base"]
        if fields and expert not in names:
            raise ConfigError(f"{model} has no expert {expert!r}; it has {', '.join(names)}")
        flags = [*flags, "--additional-config", json.dumps({"upscale": {"expert": expert}})]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *flags]


def read_fields(path: Path) -> dict:
    """``config.json`` of a model directory. Raises ConfigError if there is none: no model, or an unfinished build."""
    try:
        return json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a model directory (no readable config.json)") from error
