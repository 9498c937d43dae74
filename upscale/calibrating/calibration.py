"""Fit a checkpoint's calibrated router on a few prompts of each expert, in closed form, and write it into place."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from upscale import router_file
from upscale.calibrating.discriminant import Fit, fit
from upscale.calibrating.samples import Reader, Sample
from upscale.config import CalibrateConfig, recipe
from upscale.errors import ConfigError, TaskError
from upscale.loading import load, load_tokenizer
from upscale.runtime.routing_upscaled import BASE
from zoo.writing.amend import discard

Progress = Callable[[int, int, str], None]  # texts done, texts in all, what is being done
_NONE = {"type": "projection", "rank": 1, "top_k": 1}  # the router that is there counts for nothing, even if broken
# Where the base's own texts are like the experts' prompts, they do not tell what is in no expert's domain: a base class
# that takes more than this part of the prompts from the right expert is left out.
TAKEN = 0.1
HELD_OUT = 4  # with texts that experts wrote themselves, one of so many is kept to judge the router by


@dataclass(frozen=True)
class Depth:
    """How well the router can do at one depth, on samples left out of the fit.

    Attributes:
        depth: 0 for the embeddings, n for what enters block n.
        shrinkage: of the covariance, chosen there.
        loss: mean negative log-likelihood of the right class.
        accuracy: part of all places, at a prompt's end and in its answer, that go to the right class.
        accuracy_error: its standard error over texts.
    """

    depth: int
    shrinkage: float
    loss: float
    accuracy: float
    accuracy_error: float


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        classes: experts, and "base" if the router has that class; it has not if asked not to, or if what the base
            writes by itself cannot be told from the experts' prompts.
        depth: chosen.
        depths: all that were looked at.
        accuracy: by class, part of its texts that go to it at their prompt's end when left out of the fit.
        confidence: by class, mean probability of the class chosen there.
        texts: by class, how many texts it was fitted on.
        held_out: with self-written texts, accuracy by class on those that no fit saw; None otherwise.
    """

    classes: Sequence[str]
    depth: int
    depths: Sequence[Depth]
    accuracy: Mapping[str, float]
    confidence: Mapping[str, float]
    texts: Mapping[str, int]
    held_out: Mapping[str, float] | None


def calibrate(
    path: str | Path,
    prompts: Mapping[str, Sequence[str]] | None,
    config: CalibrateConfig | None = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Calibration:
    """Give an upscaled checkpoint a router fitted on example prompts; no labels, no completions, no gradient steps.

    Only the router's file and ``config.json`` change, all or nothing; the experts stay as they are.

    Args:
        path: directory of the checkpoint.
        prompts: at least two of each expert, and perhaps of "base", text that is to go to no expert; without those the
            base class is learnt from text that the base writes by itself. None: each expert writes its own.
        config: settings; or give them as ``options``, e.g. ``chat=True``.
        progress: called with (texts done, texts in all, what is being done).

    Raises:
        LoadError: not a directory of an upscaled model.
        TaskError: experts without prompts, too few, or a prompt that does not fit the context.
        ConfigError: a depth that the model has not; more experts per token than there are.
        OutputError: the checkpoint cannot be written.
    """
    config = config or CalibrateConfig(**options)
    directory, layout = router_file.opened(path)
    classes = [*layout.experts, *([] if config.no_base else [BASE])]
    if config.top_k > len(classes):
        raise ConfigError(f"--top-k {config.top_k} is more than the router's {len(classes)} classes")
    if prompts is not None:
        _check(prompts, layout.experts)
    discard(directory, router_file.PART)  # a router that cannot be read is in the way of the rest
    model = load(directory, dtype=config.dtype, router=_NONE)
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ConfigError(f"{path}: a calibrated router needs a decoder-only language model; use a projection router")
    reader = Reader(model, load_tokenizer(directory, padding_side="left"), config)
    if config.depth is not None and config.depth >= reader.blocks:
        raise ConfigError(f"--depth {config.depth}: the model has depths 0 to {reader.blocks - 1}")
    seen, kept = _samples(reader, layout.experts, prompts, config, progress)
    chosen, depths, found = _fit_best(seen, classes, config.depth)
    given_base = prompts is not None and BASE in prompts
    if classes[-1] == BASE and not given_base and _taken(seen, found, classes) > TAKEN:
        classes = list(layout.experts)
        seen = [s for s in seen if s.name != BASE]
        kept = [s for s in kept if s.name != BASE]
        chosen, depths, found = _fit_best(seen, classes, config.depth)
    if chosen == 0:  # what every token's embedding scores: all that routing needs, in any engine
        values = {"table": reader.embeddings.float() @ found.weight.T, "bias": found.bias}
    else:
        values = {"weight": found.weight, "bias": found.bias}
    router = {
        "type": "calibrated",
        "experts": len(layout.experts),
        "size": reader.embeddings.shape[chosen > 0],
        "depth": chosen,
        "granularity": config.granularity,
        "base": classes[-1] == BASE,
        "top_k": config.top_k or None,
        "half_life": config.half_life,
    }
    texts_used = {n: hashlib.sha256("\0".join(given).encode()).hexdigest()[:16] for n, given in (prompts or {}).items()}
    made = {"calibrated": recipe(config), "prompts": texts_used or "written by the experts"}
    router_file.replace(directory, layout, router, values, made)
    held_out = None if prompts is not None else _accuracy(kept, found, chosen, classes)
    ends = torch.cat([found.left_out[rows][:1] for rows in _rows(seen)])
    probability = ends.softmax(dim=-1).amax(dim=-1)
    confidence = {c: _mean([float(p) for p, s in zip(probability, seen, strict=True) if s.name == c]) for c in classes}
    texts = {c: sum(s.name == c for s in seen) for c in classes}
    return Calibration(classes, chosen, depths, _left_out(seen, found, classes), confidence, texts, held_out)


def _check(prompts: Mapping[str, Sequence[str]], experts: Sequence[str]) -> None:
    if unknown := sorted(prompts.keys() - {*experts, BASE}):
        raise TaskError(f"prompts for {unknown[0]}: no such expert; the model has {', '.join(experts)} and {BASE}")
    if missing := [expert for expert in experts if expert not in prompts]:
        raise TaskError(f"no prompts for {', '.join(missing)}: every expert needs some")
    if few := [name for name, given in prompts.items() if len(given) < 2]:
        raise TaskError(f"{len(prompts[few[0]])} prompt(s) for {few[0]}: at least 2 are needed, 4 to 16 are advised")


def _samples(
    reader: Reader,
    experts: Sequence[str],
    prompts: Mapping[str, Sequence[str]] | None,
    config: CalibrateConfig,
    progress: Progress | None,
) -> tuple[list[Sample], list[Sample]]:
    """Samples to fit on, and those held out of self-written ones."""
    own = sum(len(prompts[e]) for e in experts) if prompts is not None else len(experts) * config.samples
    total, done = own + (0 if config.no_base else config.samples), 0

    def step(what: str) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total, what)

    seen, kept = [], []
    for expert in experts:
        if prompts is not None:
            seen += reader.prompts(expert, prompts[expert], step)
        else:
            written = reader.written(expert, config.samples, step)
            seen += [s for n, s in enumerate(written) if n % HELD_OUT]
            kept += written[::HELD_OUT]
    if not config.no_base:
        given = None if prompts is None else prompts.get(BASE)
        if given is not None:
            seen += [reader.text(BASE, text) for text in given]
        else:
            written = reader.written(BASE, config.samples, step)
            held = prompts is None
            seen += [s for n, s in enumerate(written) if not held or n % HELD_OUT]
            kept += written[::HELD_OUT] if held else []
    return seen, kept


def _fit_best(samples: Sequence[Sample], classes: Sequence[str], wanted: int | None) -> tuple[int, list[Depth], Fit]:
    fits = {depth: _fit(samples, classes, depth) for depth in samples[0].means}
    depths = [_judge(depth, found, samples, classes) for depth, found in fits.items()]
    chosen = _choose(depths, wanted)
    return chosen, depths, fits[chosen]


def _taken(samples: Sequence[Sample], found: Fit, classes: Sequence[str]) -> float:
    """Part of the experts' texts that the base class takes from the right expert."""
    lost = []
    for sample, rows in _pairs(samples):
        if sample.name != BASE:
            scores, right = found.left_out[rows][0], classes.index(sample.name)
            lost.append(float(scores[:-1].argmax() == right and scores.argmax() != right))
    return _mean(lost)


def _rows(samples: Sequence[Sample]) -> list[slice]:
    """The rows of each sample where all samples' rows lie one after the other."""
    rows, start = [], 0
    for sample in samples:
        rows.append(slice(start, start + sample.length))
        start += sample.length
    return rows


def _fit(samples: Sequence[Sample], classes: Sequence[str], depth: int) -> Fit:
    labels = torch.tensor([classes.index(s.name) for s in samples for _ in range(s.length)])
    groups = torch.tensor([n for n, s in enumerate(samples) for _ in range(s.length)])
    fallback = len(classes) - 1 if classes[-1] == BASE and len(classes) > 1 else None
    return fit(torch.cat([s.means[depth] for s in samples]), labels, groups, fallback=fallback)


def _judge(depth: int, found: Fit, samples: Sequence[Sample], classes: Sequence[str]) -> Depth:
    right = [
        float((found.left_out[rows].argmax(dim=1) == classes.index(s.name)).float().mean())
        for s, rows in _pairs(samples)
    ]
    n, accuracy = len(right), sum(right) / len(right)
    smoothed = (sum(right) + 1) / (n + 2)  # of a perfect score the plain standard error would be 0
    error = (smoothed * (1 - smoothed) / n) ** 0.5
    return Depth(depth, found.shrinkage, found.loss, accuracy, error)


def _pairs(samples: Sequence[Sample]):
    return zip(samples, _rows(samples), strict=True)


def _choose(depths: Sequence[Depth], wanted: int | None) -> int:
    """The first depth whose accuracy is within a standard error of the best: layers before it are not routed."""
    if wanted is not None:
        return wanted
    best = max(depths, key=lambda d: d.accuracy)
    return next(d.depth for d in depths if d.accuracy >= best.accuracy - best.accuracy_error)


def _left_out(samples: Sequence[Sample], found: Fit, classes: Sequence[str]) -> dict[str, float]:
    right: dict[str, list[float]] = {c: [] for c in classes}
    for sample, rows in _pairs(samples):
        right[sample.name].append(float(found.left_out[rows][0].argmax() == classes.index(sample.name)))
    return {c: _mean(values) for c, values in right.items()}


def _accuracy(samples: Sequence[Sample], found: Fit, depth: int, classes: Sequence[str]) -> dict[str, float]:
    right: dict[str, list[float]] = {c: [] for c in classes}
    for s in samples:
        scores = found.weight @ s.means[depth][0].float() + found.bias
        right[s.name].append(float(scores.argmax() == classes.index(s.name)))
    return {c: _mean(values) for c, values in right.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def to_json(found: Calibration) -> dict:
    """Plain values."""
    return asdict(found)
