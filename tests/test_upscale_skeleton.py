"""Linears and heads are found by structure, whatever their tensors are called."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPTNeoXConfig

import upscale
from tests.architectures import TABLE, Architecture
from tests.conftest import perturbed, save_model
from upscale.building.skeleton import _norm_offset, linears, skeleton
from upscale.errors import PlanError
from zoo import Checkpoint, Group, check

GPT2 = next(architecture for architecture in TABLE if architecture.name == "gpt2")
# transformers calls this head `lm_head`, its files `embed_out`.
NEOX = Architecture(
    "gpt_neox",
    lambda: GPTNeoXConfig(
        vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
    ),
)


def edit(directory: Path, change) -> Path:
    file = directory / "model.safetensors"
    content = load_file(file)
    change(content)
    save_file(content, file, metadata={"format": "pt"})
    return directory


def test_a_head_under_another_name_is_its_own_tensor(tmp_path):
    base = save_model(NEOX.model(seed=0), tmp_path / "base")
    tune = save_model(perturbed(NEOX, 1), tmp_path / "e")
    (head,) = [linear for linear in linears(Checkpoint.open(base)) if linear.head]
    assert head.weight == "embed_out.weight"
    upscale.smile(Group.of(base, {"e": tune}), tmp_path / "out", rank=10_000, lm_head=True, rest="average")
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        ours, theirs = upscale.load(tmp_path / "out")(ids).logits, upscale.load(tune)(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_a_linear_without_a_tensor_is_named(groups, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(groups(TABLE[0]).base.location, copy)
    edit(copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        PlanError, match=r"no tensor for 1 linears of the architecture, e.g. model.layers.1.mlp.up_proj"
    ):
        linears(Checkpoint.open(copy))


@pytest.mark.parametrize("copies", ["base", "expert", "both"])
def test_a_saved_copy_of_a_head_tied_by_default_is_no_head(copies, tmp_path):
    models = {
        "base": save_model(GPT2.model(seed=0), tmp_path / "base"),
        "expert": save_model(perturbed(GPT2, 1), tmp_path / "expert"),
    }
    for name, directory in models.items():
        config = json.loads((directory / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (directory / "config.json").write_text(json.dumps(config))
        if copies in (name, "both"):
            edit(directory, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    group = Group.of(models["base"], {"e": models["expert"]})
    assert check(group).mismatches == ()
    upscale.smile(group, tmp_path / "out", rank=10_000, lm_head=True, rest="average")
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        ours, theirs = upscale.load(tmp_path / "out")(ids).logits, upscale.load(models["expert"])(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("field", "value"), [("rope_parameters", {"rope_theta": 1e6}), ("rms_norm_eps", 0.01)])
def test_an_expert_that_computes_otherwise_is_refused(field, value, groups, tmp_path):
    group = groups(TABLE[0])
    copy = tmp_path / "copy"
    shutil.copytree(group.experts["e1"].location, copy)
    config = json.loads((copy / "config.json").read_text())
    config[field], config["eos_token_id"] = value, 7
    (copy / "config.json").write_text(json.dumps(config))
    verdict = check(Group.of(group.base.location, {"e": copy}))
    assert [line.partition(" the base's")[0] for line in verdict.mismatches] == [
        f"expert e: config.json has {field} {value},"
    ]
    assert verdict.warnings == ("expert e: config.json has eos_token_id 7; the result keeps the base's 1",)


# ------------------------------------------------------------------------------------------------- norms and embeddings
def test_norms_and_embeddings_are_found_with_their_tensors(architecture, groups):
    model, found = architecture.model(0), skeleton(Checkpoint.open(groups(architecture).base.resolve()))
    stored = dict(model.named_parameters())
    norms = {name.rpartition(".")[0] for name, p in stored.items() if p.ndim == 1 and "proj" not in name}
    norms -= {name for name in norms if "attn.c_" in name or "mlp" in name}
    assert [n.name for n in found.norms] == [name for name, _ in model.named_modules() if name in norms]
    for norm in found.norms:
        assert (norm.weight, norm.width) == (f"{norm.name}.weight", len(stored[f"{norm.name}.weight"]))
        assert norm.bias == (f"{norm.name}.bias" if architecture is GPT2 else None)
        assert norm.offset == (architecture.name == "gemma2")
    embeddings = [name.removesuffix(".weight") for name in stored if re.search("embed|wte|wpe", name)]
    assert [e.name for e in found.embeddings] == embeddings
    for embedding in found.embeddings:
        shape = stored[f"{embedding.name}.weight"].shape
        assert (embedding.kind, embedding.out_features, embedding.in_features) == ("embedding", *shape)
    (head,) = [linear for linear in found.linears if linear.head]
    assert head.weight == ("lm_head.weight" if "lm_head.weight" in stored else f"{embeddings[0]}.weight")


class Scaled(nn.Module):
    """Its weight enters in the way that ``use`` says."""

    def __init__(self, use, *shape, bias=False):
        super().__init__()
        self.use, self.weight = use, nn.Parameter(torch.ones(shape or (8,)))
        if bias:
            self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return self.use(x, self.weight) + getattr(self, "bias", 0.0)


def rms(x):
    return x / x.square().mean(dim=-1, keepdim=True).sqrt()


MODULES = {  # and their offsets, None for what is no norm
    "layer": (lambda: nn.LayerNorm(8), 0.0),
    "layer without bias": (lambda: nn.LayerNorm(8, bias=False), 0.0),
    "layer without anything": (lambda: nn.LayerNorm(8, elementwise_affine=False), None),
    "rms": (lambda: nn.RMSNorm(8), 0.0),
    "offset": (lambda: Scaled(lambda x, w: rms(x) * (1 + w)), 1.0),
    "offset and bias": (lambda: Scaled(lambda x, w: rms(x) * (1 + w), bias=True), 1.0),
    "another offset": (lambda: Scaled(lambda x, w: rms(x) * (2 + w)), None),
    "squared": (lambda: Scaled(lambda x, w: rms(x) * w.square()), None),
    "gated": (lambda: Scaled(lambda x, w: rms(x) * w.sigmoid()), None),
    "added": (lambda: Scaled(lambda x, w: rms(x) + w), None),
    "turned": (lambda: Scaled(lambda x, w: rms(x) * w.flip(0)), None),
    "linear": (lambda: nn.Linear(8, 8), None),
    "embedding": (lambda: nn.Embedding(8, 8), None),
    "batch": (lambda: nn.BatchNorm1d(8), None),
    "two inputs": (lambda: nn.Bilinear(8, 8, 8), None),
    "activation": (lambda: nn.PReLU(8), None),
    "of a parent": (lambda: nn.Sequential(nn.LayerNorm(8)), None),
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_norm_is_what_behaves_like_one(kind):
    make, offset = MODULES[kind]
    with torch.device("meta"):
        module = make()
    assert _norm_offset(module) == offset
