"""Adapt a checkpoint's routers to its experts' inputs, and write them into place."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from upscale import router_file
from upscale.adapting.examples import Examples, Prompts, Tensors
from upscale.adapting.trainer import Trainer, Training
from upscale.config import AdaptConfig, recipe
from upscale.device import usable_device
from upscale.errors import ConfigError, TaskError
from upscale.loading import load, load_tokenizer
from zoo.writing.part import content_key

Progress = Callable[[int, int, str], None]  # steps done, in all, what is being done
LEAST = 2  # prompts of an expert: one to train on, one to judge by


@dataclass(frozen=True)
class Adaptation:
    """What an adaptation did.

    Attributes:
        objective: "distil" or "entropy".
        steps: taken.
        stopped: why: "steps" (all done), "patience" (no gain any more) or "diverged" (the best routers were kept).
        training: every step's loss and every judgement.
    """

    objective: str
    steps: int
    stopped: str
    training: Training

    def to_json(self) -> dict:
        """Plain values."""
        return asdict(self)


def adapt(
    path: str | Path,
    prompts: Mapping[str, Sequence[str] | Mapping[str, Tensor]],
    config: AdaptConfig | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Adaptation:
    """Train the routers of an upscaled checkpoint on its experts' inputs, without labels.

    Only routers train: those of WEMoE, or a calibrated gate. Of a language model, the objective is taken at the tokens
    of a greedy answer to each prompt; of a classifier, at its prediction by the head of the input's expert. "distil"
    needs no expert models: the checkpoint itself, routed to the input's expert, is the teacher. Only the router's file
    and ``config.json`` change, all or nothing, and only if the routers became better on held-out inputs. Killed, it
    resumes where it last judged.

    Args:
        path: directory of the checkpoint.
        prompts: of each expert: texts, or tensors by the names of ``forward``'s arguments, e.g. ``pixel_values``.
        config: settings; or give them as ``options``, e.g. ``objective="entropy"``.
        progress: called with (steps done, steps in all, what is being done).

    Raises:
        LoadError: not a directory of an upscaled model.
        TaskError: unknown experts, experts without prompts, too few, or a prompt that does not fit the context.
        ConfigError: a router without anything to train.
        OutputError: the checkpoint cannot be written.
    """
    config = config or AdaptConfig(**options)
    directory, layout = router_file.opened(path)
    if "tensors" not in layout.router:
        raise ConfigError(
            f"{path}: a {layout.router['type']} router has nothing to train; "
            "calibrate the checkpoint first, or build a WEMoE"
        )
    if unknown := sorted(prompts.keys() - set(layout.experts)):
        raise TaskError(f"prompts for {unknown[0]}: no such expert; the model has {', '.join(layout.experts)}")
    if missing := [expert for expert in layout.experts if expert not in prompts]:
        raise TaskError(f"no prompts for {', '.join(missing)}: every expert needs some")
    sizes = {name: _count(given) for name, given in prompts.items()}
    if few := [name for name, size in sizes.items() if size < LEAST]:
        raise TaskError(f"{sizes[few[0]]} prompt(s) for {few[0]}: at least {LEAST} are needed, 16 to 64 are advised")
    device = usable_device(config.device)
    model = load(directory, dtype=config.dtype).to(device)

    def prepared(what: str) -> None:
        if progress:
            progress(0, config.steps, what)

    given = {expert: prompts[expert] for expert in layout.experts}
    examples = _examples(directory, model, given, config, prepared)
    made = {"adapted": recipe(config), "prompts": {name: _digest(inputs) for name, inputs in given.items()}}
    state = directory / f".adapt-{_digest([json.dumps([made, layout.router['tensors']])])}.state"
    training = Trainer(model, examples, layout.experts, config, state).run(progress)
    if training.best.step:
        settings = {key: value for key, value in layout.router.items() if key != "tensors"}
        values = dict(model.router.named_parameters())
        router_file.replace(directory, layout, settings, values, {**made, "steps": training.best.step})
    for left in directory.glob(".adapt-*.state"):  # of this run, and of killed ones on the router that was
        left.unlink()
    return Adaptation(config.objective, len(training.losses), training.stopped, training)


def _examples(
    directory: Path, model: Any, given: Mapping, config: AdaptConfig, prepared: Callable[[str], None]
) -> Examples:
    if all(isinstance(inputs, Mapping) for inputs in given.values()):
        return Tensors(given)
    tokenizer = load_tokenizer(directory, padding_side="left")
    if model.can_generate():
        return Prompts(model, tokenizer, given, config, prepared)
    if config.chat:
        raise ConfigError("--chat needs a language model; this one classifies texts: use --prompt-template")
    return Tensors.of_texts(tokenizer, given, config.prompt_template)


def _count(inputs: Sequence[str] | Mapping[str, Tensor]) -> int:
    return len(next(iter(inputs.values()), [])) if isinstance(inputs, Mapping) else len(inputs)


def _digest(inputs: Sequence[str] | Mapping[str, Tensor]) -> str:
    if isinstance(inputs, Mapping):
        return content_key(inputs)
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
