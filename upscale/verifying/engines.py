"""A checkpoint loaded again: in transformers and, where it is installed, in vLLM, which must say the same of texts."""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from upscale.config import EvalConfig, VerifyConfig
from upscale.device import usable_device
from upscale.errors import EngineError, LoadError
from upscale.evaluating.engines import Engine, TransformersEngine, open_engine
from upscale.loading import load, load_tokenizer
from upscale.runtime.architecture_upscaled import autos_of
from upscale.verifying.finding import FAILED, OK, SKIPPED, Finding, attempted, judged

Tell = Callable[[str], None]  # what is being done
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "If 3 + 4 = 7, then 7 - 4 = 3, and 3 * 4 = 12.",
    "def add(a, b):\n    return a + b\n",
    "On Monday it rained; on Tuesday the sun came out again, and all the children went for a walk in the park.",
)
ROUTER = "router"  # nobody forced
# Nats a token by which two engines may differ: they add in other orders, which routing by small differences amplifies.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_CAUSAL = "AutoModelForCausalLM"


@dataclass(frozen=True)
class _Said:
    """What an engine said of the texts: log-likelihood in nats and tokens of each, by who was forced."""

    scores: Mapping[str, Sequence[tuple[float, int]]]
    tolerance: float


def engines(directory: Path, fields: Mapping, config: VerifyConfig, tell: Tell) -> list[Finding]:
    """Load the checkpoint in the engines that ``config`` names, one after the other, and compare them.

    Args:
        directory: of the checkpoint.
        fields: its ``config.json``.
        config: what to do.
        tell: called with what is being done.
    """
    if config.engine == "none":
        return [Finding(name, SKIPPED, "no engine was asked for") for name in ("transformers", "vllm")]
    said: list[_Said] = []
    silent = _silent(directory, fields)
    first = attempted("transformers", lambda: _transformers(directory, fields, config, said, silent, tell))
    if config.engine == "transformers":
        return [first, Finding("vllm", SKIPPED, "was not asked for")]
    if first.status == FAILED or not said:
        return [first, Finding("vllm", SKIPPED, silent or "transformers failed")]
    return [first, attempted("vllm", lambda: _vllm(directory, config, said[0], tell))]


def _silent(directory: Path, fields: Mapping) -> str:
    """Why engines cannot be asked about texts; empty if they can."""
    if _CAUSAL not in autos_of(fields):
        return "no decoder, whose texts could be scored"
    try:
        load_tokenizer(directory)
    except LoadError:
        return "no tokenizer"
    return ""


def _transformers(
    directory: Path, fields: Mapping, config: VerifyConfig, said: list[_Said], silent: str, tell: Tell
) -> Finding:
    tell("loading in transformers")
    if silent:
        model = load(directory, dtype=config.dtype).to(torch.device(usable_device(config.device)))
        return Finding("transformers", OK, f"loads as {type(model).__name__}; nothing was asked: {silent}")
    engine = TransformersEngine(str(directory), EvalConfig(dtype=config.dtype, device=config.device))
    name, dtype = type(engine.model).__name__, engine.model.dtype
    scores = _scores(engine, _forced(fields, config), "transformers", tell)
    said.append(_Said(scores, TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])))
    problems = [
        f"the log-likelihood of {TEXTS[n]!r} is {value} ({who})"
        for who, values in scores.items()
        for n, (value, _) in enumerate(values)
        if not math.isfinite(value)
    ]
    return judged("transformers", problems, f"loads as {name}; {len(TEXTS)} texts read with {', '.join(scores)}")


def _vllm(directory: Path, config: VerifyConfig, theirs: _Said, tell: Tell) -> Finding:
    tell("loading in vLLM")
    try:
        engine = open_engine(str(directory), EvalConfig(engine="vllm", dtype=config.dtype))
    except EngineError as error:
        if config.engine == "vllm":
            raise
        return Finding("vllm", SKIPPED, str(error))
    ours = _scores(engine, [None if who == ROUTER else who for who in theirs.scores], "vLLM", tell)
    differences = {who: _difference(ours[who], theirs.scores[who]) for who in ours}
    problems = [
        f"{who}: differs from transformers by {found:.2g} nats a token, {theirs.tolerance:.2g} is allowed"
        for who, found in differences.items()
        if not found <= theirs.tolerance
    ]
    told = f"differs from transformers by at most {max(differences.values()):.2g} nats a token"
    return judged(
        "vllm",
        problems,
        f"{told} ({theirs.tolerance:.2g} is allowed), with {', '.join(ours)}",
        differences={who: found if math.isfinite(found) else None for who, found in differences.items()},
        allowed=theirs.tolerance,
    )


def _forced(fields: Mapping, config: VerifyConfig) -> list[str | None]:
    """Who is forced: nobody, then those asked for, else every expert."""
    return [None, *(config.expert or fields["upscale"]["experts"])]


def _scores(
    engine: Engine, forced: Sequence[str | None], name: str, tell: Tell
) -> dict[str, Sequence[tuple[float, int]]]:
    """Asks an engine, and frees what it holds."""
    found = {}
    try:
        for expert in forced:
            who = ROUTER if expert is None else expert
            tell(f"{name}: {who}")
            engine.force(expert)
            found[who] = engine.score([("", text) for text in TEXTS], lambda _: None)
    finally:
        engine.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def _difference(ours: Sequence[tuple[float, int]], theirs: Sequence[tuple[float, int]]) -> float:
    """The largest difference in nats a token; infinite if one is no number, or of other tokens."""
    found = 0.0
    for (one, tokens), (other, others) in zip(ours, theirs, strict=True):
        apart = abs(one - other) / max(tokens, 1)
        if tokens != others or not math.isfinite(apart):
            return math.inf
        found = max(found, apart)
    return found
