"""FusionBench's SMILE checkpoints of language models in our format, tensor by tensor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from upscale.building.recipe import RECIPE, pinned, recipe_bytes, with_hashes
from upscale.errors import ConversionError
from upscale.importing.smile_checkpoint import SmileCheckpoint
from upscale.publishing.card import card
from upscale.runtime import runtime_files
from upscale.runtime.layout_upscaled import Layout, ModuleLayout
from upscale.runtime.modeling_upscaled import upscaled_config
from zoo import Checkpoint, Source, TensorSpec, Writer
from zoo.group import check_names
from zoo.hub.licences import licence_of
from zoo.reading.contents import Hashes

Progress = Callable[[int, int, str], None]  # tensors and linears done, all of them, what is being done


@dataclass(frozen=True)
class Imported:
    """What was converted.

    Attributes:
        experts: their names.
        modules: ranks of the experts of each linear that has them.
        plain: linears of the blocks that no expert changed.
        whole_biases: the experts' biases look like whole ones, and were taken as differences.
        source_bytes, base_bytes, result_bytes: sizes of the tensors of the source, of its base, and of the result.
    """

    experts: Sequence[str]
    modules: Mapping[str, Sequence[int]]
    plain: Sequence[str]
    whole_biases: bool
    source_bytes: int
    base_bytes: int
    result_bytes: int


def import_fusionbench(
    path: str | Path,
    out: str | Path,
    names: Sequence[str] | None = None,
    *,
    whole_biases: bool = False,
    progress: Progress | None = None,
) -> Imported:
    """Convert a FusionBench SMILE checkpoint of a language model; the result computes what it computes.

    Args:
        path: directory, or Hub id with an optional ``@revision``.
        out: directory to make; must not exist.
        names: of the experts, in the checkpoint's order; None: expert_0, expert_1 and so on.
        whole_biases: the experts' biases are whole ones: subtract the base's, and so mend what FusionBench computes.
        progress: called before each step with (steps done, steps in all, name).

    Raises:
        SourceError, CheckpointError: the checkpoint cannot be found or read.
        ConversionError: it is of another kind, or its tensors are not those that its ``config.json`` promises.
        GroupError: names that are none, or not one for each expert.
        NonFiniteError: NaN or infinity in a tensor.
        OutputError: see ``zoo.Writer``.
    """
    source = _source(path)
    folder = source.folder()
    model = SmileCheckpoint(Checkpoint.open(folder))
    names = [f"expert_{e}" for e in range(model.experts)] if names is None else list(names)
    check_names(names)
    if len(names) != model.experts:
        raise ConversionError(f"{path}: has {model.experts} experts, but {len(names)} names were given")
    if whole_biases and (model.rank <= 0 or not any(model.has_bias(module) for module in model.modules)):
        raise ConversionError(f"{path}: no whole biases: only low-rank experts of linears with a bias have them")
    if folder.remote:  # its headers passed: now its weights are worth fetching
        model = SmileCheckpoint(Checkpoint.open(source.resolve()))
    checkpoint, dtype = model.checkpoint, model.dtype
    declared = {name: TensorSpec(shape, dtype(name)) for name, shape in model.shapes.items()}
    base_bytes = sum(spec.nbytes for spec in declared.values())
    for module in model.modules:
        for tensor, shape in model.largest(module).shapes().items():
            declared[f"{module}.experts.{tensor}"] = TensorSpec(shape, dtype(f"{module}.weight"))
    modules: dict[str, ModuleLayout] = {}
    with (
        torch.no_grad(),
        Hashes({"base": checkpoint} if source.is_local else {}, {"base": checkpoint}) as hashes,
        Writer(out, declared) as writer,
    ):
        for number, name in enumerate(steps := [*model.shapes, *model.modules]):
            if progress:
                progress(number, len(steps), name)
            if name in model.shapes:
                writer.write(name, model.read(model.stored(name)))
                continue
            ranks, tensors = model.experts_of(name, whole_biases=whole_biases)
            if any(ranks) or "bias" in tensors:
                modules[name] = replace(model.largest(name), ranks=ranks, bias="bias" in tensors)
                for tensor, value in tensors.items():
                    writer.write(f"{name}.experts.{tensor}", value.to(dtype(f"{name}.weight")))
        router = {"type": "projection", "rank": model.router_rank, "top_k": model.top_k}
        config = upscaled_config(model.config, Layout("smile", tuple(names), router, modules))
        made = with_hashes(_recipe(source, checkpoint, names, whole_biases=whole_biases), hashes.result())
        files = {
            **checkpoint.companions,
            **runtime_files(),
            RECIPE: recipe_bytes(made),
            "README.md": card(config, made, {}).encode(),
        }
        result_bytes = writer.nbytes
        writer.commit(config, files)
    suspected = not whole_biases and model.rank > 0 and model.whole_biases
    return Imported(
        names,
        {name: layout.ranks for name, layout in modules.items()},
        model.plain,
        suspected,
        checkpoint.nbytes,
        base_bytes,
        result_bytes,
    )


def _recipe(source: Source, checkpoint: Checkpoint, names: Sequence[str], *, whole_biases: bool) -> dict:
    """``upscale.yaml``: base and experts all come from the one checkpoint."""
    origin, licence, roles = pinned(source, checkpoint), licence_of(checkpoint.path), ("base", *names)
    return {
        "upscale_zoo": version("upscale-zoo"),
        "method": "smile",
        "imported": {"format": "fusionbench", "whole_biases": whole_biases},
        "base": origin,
        "experts": dict.fromkeys(names, origin),
        "licences": dict.fromkeys(roles, licence),
        "config": {},
    }


def _source(path: str | Path) -> Source:
    if Path(path).is_file():
        raise ConversionError(
            f"{path}: a file and no directory, as FusionBench saves SMILE models of other kinds (CLIP, T5): a pickled "
            "module, which runs code when it is read; build the model from its sources with `upscale smile`"
        )
    return Source.parse(str(path))
