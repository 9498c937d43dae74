"""``upscale serve``: vLLM's own OpenAI-compatible server, started with good defaults."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import click

from upscale.errors import ConfigError, EngineError
from zoo import Source

_COMPILATION_FLAGS = (
    "--enforce-eager",
    "--no-enforce-eager",
    "--compilation-config",
    "--optimization-level",
    "-O",
    "-cc",
)
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
    - On a CPU, no compilation, which takes a minute and gains little there, and a KV cache that holds the longest
      context and at least 2 GiB, where vLLM's default is nearly all memory. On a GPU vLLM's own defaults are right.
    """
    options = {"dtype": fields.get("dtype") or fields.get("torch_dtype") or "auto"}
    if on_cpu():
        options["enforce_eager"] = True
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:  # which would win
            options["kv_cache_memory_bytes"] = max(2 << 30, _context_bytes(fields))
    return options


def _context_bytes(fields: dict) -> int:
    """Memory of the keys and values of one sequence of the longest context, with a quarter to spare."""
    heads = fields.get("num_attention_heads", 0)
    width = fields.get("head_dim") or fields.get("hidden_size", 0) // max(heads, 1)
    token = 2 * fields.get("num_hidden_layers", 0) * fields.get("num_key_value_heads", heads) * width
    itemsize = 4 if "float32" in str(fields.get("dtype") or fields.get("torch_dtype")) else 2
    return token * itemsize * fields.get("max_position_embeddings", 0) * 5 // 4


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
        ConfigError: ``expert`` beside vLLM's own flag for it.
        LoadError: a directory that is no finished model, or an expert that it has not.
    """
    from upscale.loading import locate, read_config, require_expert

    directory = locate(model)
    given = {flag.split("=")[0].replace("_", "-") for flag in flags}  # as vLLM reads them
    defaults = engine_defaults(read_config(directory))
    if not given & {"--served-model-name"}:
        name = Path(model).resolve().name if Path(model).is_dir() else Source.parse(model).location
        flags = [*flags, "--served-model-name", name]
    if "--dtype" not in given:
        flags = [*flags, "--dtype", defaults["dtype"]]
    if "enforce_eager" in defaults and not any(flag.startswith(_COMPILATION_FLAGS) for flag in given):
        flags = [*flags, "--enforce-eager"]
    if "kv_cache_memory_bytes" in defaults and not given & {"--kv-cache-memory-bytes", "--gpu-memory-utilization"}:
        flags = [*flags, "--kv-cache-memory-bytes", str(defaults["kv_cache_memory_bytes"])]
    if expert is not None:
        if "--additional-config" in given:
            raise ConfigError("--expert and --additional-config exclude each other; put the expert in the latter")
        require_expert(directory, expert)
        flags = [*flags, "--additional-config", json.dumps({"upscale": {"expert": expert}})]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory), *flags]
