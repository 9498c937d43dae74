"""Take one expert out of an upscaled checkpoint: as a LoRA adapter, or as a model of its own."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from upscale.building.stored import Stored
from upscale.building.stored_expert import StoredExpert
from upscale.errors import ExpertError
from upscale.growing.cards import adapter_card, model_card
from upscale.loading import locate
from upscale.runtime.layout_upscaled import LOW_RANK
from upscale.runtime.router_upscaled import in_block
from upscale.runtime.routing_upscaled import BASE
from zoo import TensorSpec, Writer
from zoo.writing.adapter import write_adapter

Progress = Callable[[int, int, str], None]  # tensors done, in all, which


@dataclass(frozen=True)
class Extracted:
    """What was taken out.

    Attributes:
        nbytes: size of the tensors.
        rank: the largest of a LoRA's; None for a model.
        left_out: by tensor, the norm of what a LoRA cannot hold of the expert's change.
        kept: part of the squared norm of all that is stored of the expert that was taken out.
    """

    nbytes: int
    rank: int | None = None
    left_out: Mapping[str, float] | None = None
    kept: float = 1.0


def extract_model(path: str | Path, expert: str, out: str | Path, *, progress: Progress | None = None) -> Extracted:
    """Write one expert as a plain model of the base's type: the base's weights plus what is stored of the expert's.

    It computes what the upscaled model computes when it is forced to the expert; at full rank it is the fine-tune.

    Args:
        path: of the upscaled checkpoint, a directory or a Hub id.
        expert: its name; "base" for the base alone.
        out: directory to make; must not exist.
        progress: called after each tensor.

    Raises:
        SourceError: no such directory or Hub id.
        LoadError: no upscaled model, or none with this expert.
        OutputError: see ``zoo.Writer``.
    """
    stored = Stored.open(locate(path))
    model = stored.base if expert == BASE else StoredExpert.of(stored, expert)
    declared = {name: TensorSpec(spec.shape, spec.dtype) for name, spec in model.tensors.items()}
    with torch.no_grad(), Writer(out, declared) as writer:
        for done, name in enumerate(declared, start=1):
            writer.write(name, model.read(name))
            if progress:
                progress(done, len(declared), name)
        writer.commit(model.config, {**model.companions, "README.md": model_card(stored, expert).encode()})
        return Extracted(writer.nbytes)


def extract_lora(path: str | Path, expert: str, out: str | Path, *, progress: Progress | None = None) -> Extracted:
    """Write the factors of one expert's block linears as a LoRA adapter of PEFT over the plain base.

    The scaling is 1 in every module, so that the factors are those that are stored, and each module has its own rank.

    Args:
        path: of the upscaled checkpoint, a directory or a Hub id.
        expert: its name.
        out: directory to make; must not exist.
        progress: called after each tensor.

    Raises:
        SourceError: no such directory or Hub id.
        LoadError: no upscaled model, or none with this expert.
        ExpertError: what is stored is no LoRA over the base; says why and what to do.
        OutputError: see ``zoo.Writer``.
    """
    stored = Stored.open(locate(path))
    model = StoredExpert.of(stored, expert)
    _require_plain(stored)
    linears = {n.name: n for n in stored.skeleton.linears if in_block(n.name) and model.rank(n) and n.kind == "linear"}
    if not linears:
        raise ExpertError(f"{path}: expert {expert} changed no linear of a block, so there is no LoRA of it")
    ranks = {name: model.rank(linear) for name, linear in linears.items()}
    declared: dict[str, TensorSpec] = {}
    for name, linear in linears.items():
        dtype = stored.base.tensors[linear.weight].dtype
        declared[_tensor(name, "A")] = TensorSpec((ranks[name], linear.in_features), dtype)
        declared[_tensor(name, "B")] = TensorSpec((linear.out_features, ranks[name]), dtype)
    sides = {_tensor(name, side): (linear, side) for name, linear in linears.items() for side in "AB"}
    left_out = _left_out(model, {linear.weight for linear in linears.values()})
    done, held = 0, 0.0

    def read(tensor: str) -> Tensor:
        nonlocal done, held
        linear, side = sides[tensor]
        factors = model.factors(linear)
        done += 1
        if progress:
            progress(done, len(declared), tensor)
        if side == "A":
            return factors.down.to(declared[tensor].dtype)
        held += float(factors.up.double().square().sum())  # of orthonormal directions
        return factors.up.to(declared[tensor].dtype)

    rank = max(ranks.values())
    settings = _settings(stored, ranks, transposed=any(n.transposed for n in linears.values()))
    with torch.no_grad():
        card = adapter_card(model, rank, left_out)
        write_adapter(out, declared, read, settings, {"README.md": card.encode()})
    lost = sum(norm**2 for norm in left_out.values())
    return Extracted(sum(s.nbytes for s in declared.values()), rank, left_out, held / (held + lost))


def _tensor(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"


def _require_plain(stored: Stored) -> None:
    remedy = "take the expert out with --as model"
    if any(module.vectors != LOW_RANK for module in stored.layout.modules.values()):
        raise ExpertError(f"{stored.path}: task vectors are stored whole or in part, not as factors; {remedy}")
    if not stored.recipe:
        raise ExpertError(f"{stored.path}: no upscale.yaml, which names the base that a LoRA is for; {remedy}")
    if stored.merged:
        raise ExpertError(
            f"{stored.path}: everything but the experts is a merge of the group, over which a LoRA for the plain base "
            f"means something else; {remedy}"
        )


def _left_out(model: StoredExpert, held: set[str]) -> dict[str, float]:
    """By tensor that the expert changed and the LoRA does not hold, the norm of the change."""
    found = {}
    for name, spec in model.tensors.items():
        changed = name in model.stored.places or name not in model.stored.base.tensors or name in model.heads
        if name in held or not changed:
            continue
        value = model.read(name).float()
        base = model.stored.base.tensors.get(name)
        if base is not None and base.shape == spec.shape:
            value -= model.stored.base.read(name).float()
        if norm := float(torch.linalg.vector_norm(value)):
            found[name] = norm
    return found


def _settings(stored: Stored, ranks: Mapping[str, int], *, transposed: bool) -> dict:
    """``adapter_config.json``: alpha equals the rank everywhere, in PEFT's own words and in vLLM's."""
    most = max(ranks.values())
    less = {module: rank for module, rank in ranks.items() if rank < most}
    pinned = re.fullmatch(r"(.+)@([0-9a-f]{40})", base := stored.source)
    local = bool(base) and Path(base).is_dir()
    return {
        "peft_type": "LORA",
        "task_type": _task(stored),
        "base_model_name_or_path": str(Path(base).resolve()) if local else pinned[1] if pinned else base or None,
        "revision": pinned[2] if pinned and not local else None,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": less,
        "alpha_pattern": less,
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _task(stored: Stored) -> str | None:
    """PEFT's name of what the base's class does."""
    ends = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
    ends |= {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    kinds = stored.base.config.get("architectures") or ["ForCausalLM"]
    return next((task for end, task in ends.items() if kinds[0].endswith(end)), None)
