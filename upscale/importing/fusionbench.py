"""FusionBench's SMILE checkpoints of language models in our format, tensor by tensor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from upscale.errors import ConversionError
from upscale.importing.smile_checkpoint import SmileCheckpoint
from upscale.runtime import runtime_files
from upscale.runtime.layout_upscaled import Layout, ModuleLayout
from upscale.runtime.modeling_upscaled import upscaled_config
from zoo import Checkpoint, Source, TensorSpec, Writer
from zoo.group import check_names
from zoo.preflight import parameters
from zoo.reading.companions import companions

Progress = Callable[[int, int, str], None]  # bytes of the source done, bytes in all, what is being done


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
        progress: called after each tensor with (bytes done, bytes in all, name).

    Raises:
        SourceError, CheckpointError: the checkpoint cannot be found or read.
        ConversionError: it is of another kind, or its tensors are not those that its ``config.json`` promises.
        GroupError: names that are none, or not one for each expert.
        NonFiniteError: NaN or infinity in a tensor.
        OutputError: see ``zoo.Writer``.
    """
    source = _source(path)
    model = SmileCheckpoint(Checkpoint.open(source.resolve()))
    names = [f"expert_{e}" for e in range(model.experts)] if names is None else list(names)
    check_names(names)
    if len(names) != model.experts:
        raise ConversionError(f"{path}: has {model.experts} experts, but {len(names)} names were given")
    if whole_biases and (model.rank <= 0 or not model.biases):
        raise ConversionError(f"{path}: no whole biases: only low-rank experts of linears with a bias have them")
    checkpoint = model.checkpoint
    declared = {
        name: TensorSpec(shape, checkpoint.tensors[model.stored(name)].dtype) for name, shape in model.shapes.items()
    }
    base_bytes = sum(spec.nbytes for spec in declared.values())
    for module in model.modules:
        for tensor, shape in model.largest(module).shapes().items():
            declared[f"{module}.experts.{tensor}"] = TensorSpec(shape, declared[f"{module}.weight"].dtype)
    done, total = 0, sum(info.nbytes for info in parameters(checkpoint).values())
    modules: dict[str, ModuleLayout] = {}
    with torch.no_grad(), Writer(out, declared) as writer:

        def step(nbytes: int, name: str) -> None:
            nonlocal done
            done += nbytes
            if progress:
                progress(done, total, name)

        for name in model.shapes:
            writer.write(name, model.read(model.stored(name)))
            step(declared[name].nbytes, name)
        for module in model.modules:
            down, up, ranks = model.factors(module)
            tensors = {"down": down, "up": up}
            if model.has_bias(module):
                base, own = model.biases[module]
                bias = own - base if whole_biases else own
                tensors |= {"bias": bias} if bias.any() else {}
            if any(ranks) or "bias" in tensors:
                modules[module] = ModuleLayout(down.shape[1], up.shape[0], ranks, "bias" in tensors)
                for tensor, value in tensors.items():
                    name = f"{module}.experts.{tensor}"
                    writer.write(name, value.to(declared[name].dtype))
            prefixes = (f"{module}.gate.", f"{module}.experts.")
            step(sum(i.nbytes for n, i in checkpoint.tensors.items() if n.startswith(prefixes)), module)
        router = {"type": "projection", "rank": model.router_rank, "top_k": model.top_k}
        layout = Layout("smile", tuple(names), router, modules)
        made = {
            "upscale_zoo": version("upscale-zoo"),
            "method": "smile",
            "imported": {"format": "fusionbench", "source": str(source), "whole_biases": whole_biases},
            "experts": names,
        }
        files = {
            **companions(checkpoint.path),
            **runtime_files(),
            "upscale.yaml": yaml.safe_dump(made, sort_keys=False).encode(),
        }
        result_bytes = writer.nbytes
        writer.commit(upscaled_config(model.config, layout), files)
    suspected = not whole_biases and model.rank > 0 and model.whole_biases
    ranks = {name: layout.ranks for name, layout in modules.items()}
    return Imported(names, ranks, model.plain, suspected, total, base_bytes, result_bytes)


def _source(path: str | Path) -> Source:
    if Path(path).is_file():
        raise ConversionError(
            f"{path}: a file and no directory, as FusionBench saves SMILE models of other kinds (CLIP, T5): a pickled "
            "module, which runs code when it is read; build the model from its sources with `upscale smile`"
        )
    return Source.parse(str(path))
