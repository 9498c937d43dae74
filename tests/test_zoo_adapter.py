"""LoRA adapters as experts, against PEFT itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters import merged, save_adapter, with_adapter
from tests.architectures import TABLE
from tests.conftest import save_model
from tests.reference.models import IDS, close, logits
from upscale import load, merge, smile
from upscale.building.methods import smile as smile_method
from upscale.building.plan import make_plan
from upscale.building.skeleton import skeleton
from upscale.config import SmileConfig
from zoo import Checkpoint, CheckpointError, Group, check
from zoo.reading.adapter import Adapter
from zoo.reading.folder import Folder
from zoo.reading.origin import check_origin

ROWS = {row.name: row for row in TABLE}
ATTENTION = {"llama": ["q_proj", "v_proj"], "qwen2": ["q_proj", "o_proj"], "gpt2": ["c_attn", "c_proj"]}
KINDS = {  # settings of PEFT, and the architecture to use them on
    "rank and alpha": ("llama", {"r": 16, "lora_alpha": 4}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 16, "use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"^.*v_proj": 2}}),
    "every linear": ("llama", {"target_modules": "all-linear"}),
    "biases": ("qwen2", {"bias": "lora_only"}),
    "bias of B": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj"]}),
    "conv1d, square ones too": ("gpt2", {}),
    "modules to save": ("llama", {"modules_to_save": ["lm_head", "input_layernorm"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
}


@pytest.fixture(scope="module")
def made(groups, tmp_path_factory):
    """``made(kind)``: directories of the base and of an adapter of one of KINDS."""
    done = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in done:
            row, options = KINDS[kind]
            base = Path(groups(ROWS[row]).base.location)
            settings = {"target_modules": ATTENTION[row], **options}
            done[kind] = base, save_adapter(base, tmp_path_factory.mktemp("adapter") / "lora", **settings)
        return done[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_its_tensors_are_those_that_peft_merges(kind, made):
    base, directory = made(kind)
    opened = Checkpoint.open(base)
    adapter = Adapter.open(Folder(directory), opened)
    wanted = merged(base, directory)
    prefix = "transformer." if kind.startswith("conv1d") else ""
    changed = 0
    for name in opened.tensors:
        want = wanted[name] if name in wanted else wanted[prefix + name]
        torch.testing.assert_close(adapter.read(name).float(), want, atol=1e-6, rtol=0)
        product = adapter.product(name)
        if product is not None:
            torch.testing.assert_close(product.dense(), want - opened.read(name), atol=1e-6, rtol=0)
            assert product.left.shape[1] <= 16  # never a matrix of full rank
        changed += not torch.equal(want, opened.read(name))
    assert changed >= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_upscaled_from_it_is_it(kind, made, tmp_path):
    """At its own rank nothing is left behind, whatever it changes."""
    base, directory = made(kind)
    report = smile(Group.of(base, {"lora": directory}), tmp_path / "out", rank=999, router_rank=2)
    ranks = [rank for module in report.modules for rank in module.ranks.values()]
    assert ranks and (max(ranks) <= 16 or kind == "modules to save")
    close(logits(load(tmp_path / "out", expert="lora")), logits(with_adapter(base, directory)))


def test_factors_are_peft_s_delta(made, tmp_path):
    """Of a rank-16 group, the product of what is stored is PEFT's own merged delta."""
    base, directory = made("every linear")
    smile(Group.of(base, {"lora": directory}), tmp_path / "out", rank=16)
    stored, start = load_file(tmp_path / "out/model.safetensors"), load_file(base / "model.safetensors")
    wanted = merged(base, directory)
    for linear in skeleton(Checkpoint.open(base)).linears:
        if linear.head:
            continue
        up, down = (stored[f"{linear.name}.experts.{side}"] for side in ("up", "down"))
        torch.testing.assert_close(up @ down, wanted[linear.weight] - start[linear.weight], atol=1e-5, rtol=0)
        torch.testing.assert_close(down @ down.T, torch.eye(len(down)), atol=1e-5, rtol=0)


def test_a_tied_base_gets_a_head_of_its_own_where_an_adapter_parts_them(groups, tmp_path):
    """In PEFT an adapter of the embedding leaves the tied head alone, and one of the head the embedding."""
    base = Path(groups(ROWS["qwen2"]).base.location)
    experts = {
        "head": save_adapter(base, tmp_path / "head", target_modules=["q_proj", "lm_head"]),
        "embedding": save_adapter(base, tmp_path / "embedding", 2, target_modules=["q_proj", "embed_tokens"]),
    }
    smile(Group.of(base, experts), tmp_path / "out", rank=8)
    assert not json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    for name, directory in experts.items():
        close(logits(load(tmp_path / "out", expert=name)), logits(with_adapter(base, directory)))


def test_adapters_and_full_fine_tunes_in_one_group(groups, made, tmp_path):
    base, directory = made("rslora")
    full = groups(ROWS["llama"]).experts["e1"].location
    group = Group.of(base, {"lora": directory, "full": full})
    smile(group, tmp_path / "out", rank=999, router_rank=2)
    close(logits(load(tmp_path / "out", expert="lora")), logits(with_adapter(base, directory)))
    close(logits(load(tmp_path / "out", expert="full")), logits(load(full)))
    merge(group, tmp_path / "average")
    own, whole, mean = merged(base, directory), load(full).state_dict(), load(tmp_path / "average").state_dict()
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (own[name] + whole[name]) / 2, atol=1e-6, rtol=1e-6)


def test_a_pickled_adapter_needs_leave(made, tmp_path):
    base, directory = made("rslora")
    copy = shutil.copytree(directory, tmp_path / "copy")
    torch.save(load_file(copy / "adapter_model.safetensors"), copy / "adapter_model.bin")
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expert lora: .*adapter_model.bin.*pass --allow-pickle"):
        check(Group.of(base, {"lora": copy}))
    name = "model.layers.0.self_attn.q_proj.weight"
    allowed = check(Group.of(base, {"lora": copy}, allow_pickle=True)).experts["lora"]
    assert torch.equal(allowed.read(name), check(Group.of(base, {"lora": directory})).experts["lora"].read(name))


def settings(**changes):
    def change(directory: Path) -> None:
        content = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps(content | changes))

    return change


def stored(change):
    def rewrite(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return rewrite


def first(state: dict, end: str) -> str:
    return next(name for name in state if name.endswith(end))


REFUSED = {
    "DoRA": (settings(use_dora=True), "use_dora is set: DoRA rescales.*merge it into its base"),
    "another method": (settings(peft_type="IA3"), "a PEFT adapter of type IA3; only LoRA is a low-rank difference"),
    "PiSSA": (settings(init_lora_weights="pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'.*merge it"),
    "activated": (settings(alora_invocation_tokens=[1]), "alora_invocation_tokens is set"),
    "tokens": (settings(trainable_token_indices=[1]), "trainable_token_indices is set"),
    "no rank": (settings(r=None), "lacks r or lora_alpha"),
    "one factor": (
        stored(lambda s: {n: t for n, t in s.items() if n != first(s, "lora_A.weight")}),
        "q_proj has one factor of two; fetch the adapter again",
    ),
    "another base's shape": (
        stored(lambda s: {**s, (n := first(s, "lora_A.weight")): torch.zeros(len(s[n]), 32)}),
        r"q_proj has factors \[128, 4\] and \[4, 32\], the base's .* is \[128, 64\]; it was not trained on this base",
    ),
    "another base's modules": (
        stored(lambda s: {n.replace("layers.1", "layers.7"): t for n, t in s.items()}),
        "changes model.layers.7.self_attn.q_proj.weight, which the base has not",
    ),
    "magnitudes": (
        stored(lambda s: {**s, "base_model.model.x.lora_magnitude_vector": torch.ones(3)}),
        "no part of a plain LoRA",
    ),
    "not gathered": (
        stored(lambda s: {**s, first(s, "lora_A.weight"): torch.zeros(0)}),
        r"has shape \[0\]; only LoRA of matrices is read",
    ),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "an adapter without weights"),
    "truncated": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{"),
        "truncated or damaged",
    ),
    "another base": (
        settings(base_model_name_or_path="{other}"),
        "trained on .*/other, whose weights are not those of .*; use that base",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_lora_of_this_base_is_refused_with_the_reason(change, message, made, tmp_path):
    base, directory = made("rslora")
    copy = shutil.copytree(directory, tmp_path / "copy")
    change(copy)
    if "{other}" in (copy / "adapter_config.json").read_text():
        save_model(ROWS["llama"].model(seed=5), tmp_path / "other")
        settings(base_model_name_or_path=str(tmp_path / "other"))(copy)
    with pytest.raises(CheckpointError, match=f"^expert lora: .*{message}"):
        check(Group.of(base, {"lora": copy}))


def test_a_base_of_another_name_is_only_a_doubt(made, tmp_path):
    base, directory = made("rslora")
    copy = shutil.copytree(directory, tmp_path / "copy")
    settings(base_model_name_or_path="org/Somewhere-7B")(copy)
    (line,) = check(Group.of(base, {"lora": copy})).warnings
    assert line.startswith("expert lora: says that it was trained on org/Somewhere-7B; make sure that")
    settings(base_model_name_or_path=f"org/{base.name}")(copy)
    assert check(Group.of(base, {"lora": copy})).warnings == ()


def test_a_base_from_the_hub_is_known_by_its_id_and_commit(made, tmp_path):
    base, _ = made("rslora")
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--org--base/snapshots" / commit
    shutil.copytree(base, cached)
    opened = Checkpoint.open(cached)

    def origin(**said):
        return check_origin({"base_model_name_or_path": "org/base", **said}, "org/base", "v1", opened)

    assert origin() is None and origin(revision="main") is None and origin(revision=commit) is None
    assert origin(revision="v1") is None and origin(base_model_name_or_path="Org/Base") is None
    with pytest.raises(CheckpointError, match="trained on org/other, the group's base is org/base; use that base"):
        origin(base_model_name_or_path="org/other")
    with pytest.raises(CheckpointError, match="trained on revision v2 of org/base, the group's base is v1; use it"):
        origin(revision="v2")


def test_an_adapter_that_changes_nothing_of_the_base_is_idle(made, tmp_path):
    """A LoRA whose B is still zero wins no token."""
    base, _ = made("rslora")
    idle = save_adapter(base, tmp_path / "idle", scale=0.0, target_modules=["q_proj"])
    report = smile(Group.of(base, {"idle": idle}), tmp_path / "out", rank=8)
    assert report.modules == []
    model = load(tmp_path / "out")
    assert torch.equal(logits(model), logits(load(base))) and IDS.numel()


def test_the_plan_knows_the_ranks_from_the_headers(made):
    """So that size, disk and memory are not those of full fine-tunes."""
    base, directory = made("every linear")
    plan = make_plan(check(Group.of(base, {"lora": directory})), smile_method, SmileConfig())
    ranks = {linear.name: plan.layouts[linear.name].ranks for linear in plan.linears}
    assert set(ranks.values()) == {(8,), (0,)}  # PEFT's default, and what the adapter leaves alone
    assert [name for name, (rank,) in ranks.items() if not rank] == ["model.embed_tokens", "lm_head"]
    full = make_plan(check(Group.of(base, {"full": base})), smile_method, SmileConfig())
    assert plan.result_bytes < full.result_bytes and max(plan.working_bytes.values()) < max(full.working_bytes.values())
