"""Builds over the architecture table: identities of the result's logits, bytes and report."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.architectures import TABLE
from tests.conftest import perturbed, save_model
from tests.reference.models import block_linears, close, dense, in_block, logits, paths, plain, tensors
from upscale import load, smile
from upscale.errors import ConfigError, NonFiniteError, PlanError
from zoo import Group

FULL = 1000  # clamped: full rank


def tuned(architecture, root, **experts):
    """A group whose experts changed only the parameters that their function of the name accepts."""
    base = save_model(architecture.model(seed=0), root / "base")
    made = {}
    for seed, (name, accepts) in enumerate(experts.items(), start=1):
        made[name] = save_model(perturbed(architecture, seed, names=accepts), root / name)
    return Group.of(base, made)


def test_full_rank_of_one_expert_is_the_fine_tune_where_the_rest_is_averaged(architecture, groups, builds):
    out, report = builds(architecture, 1, rank=FULL, rest="average", lm_head=True)
    model = load(out)
    close(logits(model), logits(plain(groups(architecture, 1).experts["e1"].resolve())))
    heads = [name for name in model.layout.modules if not in_block(name)]
    assert all(e == pytest.approx(1, abs=1e-5) for e in report.energy.values())
    assert heads == ([] if architecture.model(0).config.tie_word_embeddings else ["lm_head"])


def test_each_forced_expert_of_full_rank_is_base_plus_its_linears(architecture, groups, builds):
    out, _ = builds(architecture, 3, rank=FULL, rest="base")
    model = load(out)
    base, experts = paths(groups(architecture, 3))
    for name, path in experts.items():
        with model.force(name):
            close(logits(model), logits(dense(base, path)))
    with model.force("base"):
        assert torch.equal(logits(model), logits(plain(base)))


@pytest.mark.parametrize("rest", ["experts", "average"])
def test_experts_that_equal_the_base_leave_it_alone(architecture, groups, tmp_path, rest):
    base = groups(architecture, 3).base.resolve()
    report = smile(Group.of(base, {"a": base, "b": base}), tmp_path / "out", rank=8, lm_head=True, rest=rest)
    assert (report.modules, report.rest, report.energy) == ([], [], {})
    assert report.result_bytes == report.base_bytes
    model = load(tmp_path / "out")
    assert model.layout.modules == {}
    assert torch.equal(logits(model), logits(plain(base)))


def test_partial_changes_make_idle_experts(architecture, tmp_path):
    """``first`` changed block 0, ``biases`` only biases of block 1, ``norms`` nothing that is upscaled."""
    linears = block_linears(architecture.model(0))
    group = tuned(
        architecture,
        tmp_path,
        first=lambda n: n in linears and ".0." in n and n.endswith("weight"),
        biases=lambda n: n in linears and ".1." in n and n.endswith("bias"),
        norms=lambda n: "norm" in n or "ln_" in n,
    )
    report = smile(group, tmp_path / "out", rank=FULL, rest="base")
    model = load(tmp_path / "out")
    weights = {n.removesuffix(".weight") for n in linears if ".0." in n and n.endswith("weight")}
    biased = {n.removesuffix(".bias") for n in linears if ".1." in n and n.endswith("bias")}
    assert set(model.layout.modules) == weights | biased
    for name, module in model.layout.modules.items():
        full = min(module.in_features, module.out_features)
        assert module.ranks == ((full, 0, 0) if name in weights else (0, 0, 0))
        assert module.bias == (name in biased)
    base, experts = paths(group)
    for name in ("first", "biases"):  # they changed nothing else, so that forcing gives the fine-tune
        with model.force(name):
            close(logits(model), logits(plain(experts[name])))
    with model.force("norms"):
        assert torch.equal(logits(model), logits(plain(base)))
    assert report.left_behind("norms")[1] > 0
    assert report.left_behind("first") == pytest.approx((0, 0), abs=1e-4)


@pytest.mark.parametrize("rest", ["base", "average"])
def test_an_untied_or_tied_head_is_upscaled(architecture, groups, builds, rest):
    out, _ = builds(architecture, 2, rank=FULL, lm_head=True, rest=rest)
    model = load(out)
    base, experts = paths(groups(architecture, 2))
    tunes = {name: plain(path).state_dict() for name, path in experts.items()}
    for name in experts:
        reference = plain(base)
        upscaled = block_linears(reference)
        state = {}
        for n, t in reference.state_dict().items():
            average = torch.stack([tune[n] for tune in tunes.values()]).mean(dim=0)
            state[n] = tunes[name][n] if n in upscaled else average if rest == "average" else t
        head = tunes[name]["lm_head.weight"]
        reference.config.tie_word_embeddings = False
        reference.lm_head.weight = nn.Parameter(torch.empty_like(head))
        reference.load_state_dict(state | {"lm_head.weight": head})
        with model.force(name):
            close(logits(model), logits(reference))


@pytest.mark.parametrize(
    "options",
    [{"include": ("*.0.*",)}, {"exclude": ("*.1.*",)}, {"include": ("*.0.*", "*.1.*"), "exclude": ("*.1.*",)}],
    ids=str,
)
def test_include_and_exclude_choose_by_name(architecture, builds, options):
    out, report = builds(architecture, 2, rank=4, router_rank=2, rest="base", **options)
    names = {n.removesuffix(".weight") for n in block_linears(architecture.model(0)) if n.endswith("weight")}
    assert {m.name for m in report.modules} == {name for name in names if ".0." in name}
    assert set(load(out).layout.modules) == {m.name for m in report.modules}


def test_what_a_user_can_get_wrong(groups, tmp_path):
    group = groups(TABLE[0], 2)
    with pytest.raises(PlanError, match=r"nothing to upscale.*\*\.mlp\.down_proj.*\*\.self_attn\.q_proj"):
        smile(group, tmp_path / "out", include=("*.nothing",))
    with pytest.raises(ConfigError, match="--top-k 3 is more than the group's 2 experts"):
        smile(group, tmp_path / "out", top_k=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["weight", "bias", "rest"])
def test_nan_is_named_and_leaves_nothing(tmp_path, part):
    qwen2 = next(a for a in TABLE if a.name == "qwen2")
    bad = qwen2.model(seed=0)
    q_proj = bad.model.layers[1].self_attn.q_proj
    {"weight": q_proj.weight, "bias": q_proj.bias, "rest": bad.model.norm.weight}[part].data.view(-1)[3] = torch.nan
    base, tune = (save_model(qwen2.model(seed), tmp_path / f"{seed}") for seed in (0, 1))
    group = Group.of(base, {"good": tune, "bad": save_model(bad, tmp_path / "bad")})
    name = {"rest": "model.norm.weight"}.get(part, f"model.layers.1.self_attn.q_proj.{part}")
    with pytest.raises(NonFiniteError) as error:
        smile(group, tmp_path / "out", rank=8)
    assert "expert bad" in str(error.value)
    assert name in str(error.value)
    assert not any("out" in path.name for path in tmp_path.iterdir())


def test_base_tensors_and_companions_keep_their_bytes(architecture, groups, builds):
    out, _ = builds(architecture, 3, rank=FULL)
    base, _ = paths(groups(architecture, 3))
    built = tensors(out)
    stripped = {name: t for name, t in built.items() if ".experts." not in name}
    original = tensors(base)
    assert stripped.keys() == original.keys()
    assert all(torch.equal(stripped[n].view(torch.uint8), t.view(torch.uint8)) for n, t in original.items())
    files = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert files <= {p.name for p in out.iterdir()}
    assert all((out / name).read_bytes() == (base / name).read_bytes() for name in files)
    config, was = (json.loads((d / "config.json").read_text()) for d in (out, base))
    own = {"model_type", "architectures", "auto_map", "upscale", "base_model_type"}
    assert {k: v for k, v in config.items() if k not in own} == {k: v for k, v in was.items() if k not in own}
    assert config["base_model_type"] == was["model_type"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_sources_stay_half_and_keep_their_deltas(architecture, tmp_path, dtype):
    base = save_model(architecture.model(0).to(dtype), tmp_path / "base")
    tune = save_model(perturbed(architecture, 1).to(dtype), tmp_path / "e")
    smile(Group.of(base, {"e": tune}), tmp_path / "out", rank=FULL)
    built, was, now = tensors(tmp_path / "out"), tensors(base), tensors(tune)
    assert {t.dtype for t in built.values()} == {dtype}
    assert all(torch.equal(built[name], t) for name, t in was.items())
    eps = torch.finfo(dtype).eps  # twice the rounding of one factor; two are rounded
    for name in [n.removesuffix(".experts.down") for n in built if n.endswith(".experts.down")]:
        up, down = built[f"{name}.experts.up"].double(), built[f"{name}.experts.down"].double()
        delta = now[f"{name}.weight"].double() - was[f"{name}.weight"].double()
        got = up @ down
        error = min((got - d).norm() for d in (delta, delta.T) if d.shape == got.shape)  # Conv1D stores [i, o]
        assert error <= eps * delta.norm()
    model = load(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.isfinite(logits(model)).all()


def test_dtype_option_rounds_every_tensor_once(architecture, groups, builds):
    out, report = builds(architecture, 2, rank=8, dtype="bfloat16")
    full, _ = builds(architecture, 2, rank=8)
    built, exact = tensors(out), tensors(full)
    assert built.keys() == exact.keys()
    assert all(torch.equal(t, exact[name].bfloat16()) for name, t in built.items())
    assert report.result_bytes == sum(t.nbytes for t in exact.values()) // 2
    assert load(out).dtype == torch.bfloat16
    assert load(out, dtype="float32").dtype == torch.float32


def test_another_process_builds_the_same_bytes(groups, builds, tmp_path):
    """Not only on another day: with another order of Python's sets."""
    jobs = []
    for architecture in TABLE:
        (tmp_path / f"{architecture.name}.yaml").write_text(_yaml(groups(architecture, 2)))
        jobs.append(f"smile({f'{architecture.name}.yaml'!r}, {architecture.name!r}, rank=8)")
    env = {**os.environ, "PYTHONHASHSEED": "5", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", "\n".join(["from upscale import smile", *jobs])], cwd=tmp_path, env=env, check=True
    )
    for architecture in TABLE:
        one, two = builds(architecture, 2, rank=8)[0], tmp_path / architecture.name
        names = {p.relative_to(one) for p in one.rglob("*")}
        assert names == {p.relative_to(two) for p in two.rglob("*")}
        assert [n for n in sorted(names) if (one / n).read_bytes() != (two / n).read_bytes()] == []


def _yaml(group):
    base, experts = paths(group)
    return f"base: {base}\nexperts:\n" + "".join(f"  {name}: {path}\n" for name, path in experts.items())


def test_sharded_sources_build_the_same(architecture, groups, builds, tmp_path):
    base, experts = paths(groups(architecture, 2))
    sharded = {}
    for name, path in {"base": base, **experts}.items():
        shutil.copytree(path, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
        plain(path).save_pretrained(tmp_path / name, max_shard_size="100KB")
        assert len(list((tmp_path / name).glob("model-*.safetensors"))) > 1
        sharded[name] = tmp_path / name
    smile(Group.of(sharded.pop("base"), sharded), tmp_path / "out", rank=8)
    one, two = tensors(builds(architecture, 2, rank=8)[0]), tensors(tmp_path / "out")
    assert one.keys() == two.keys()
    assert all(torch.equal(t, two[name]) for name, t in one.items())


def test_checkpoints_without_the_base_models_prefix(architecture, groups, builds, tmp_path):
    """Saved from the model without its head, as gpt2 on the Hub is: ``h.0...`` instead of ``transformer.h.0...``."""
    base, experts = paths(groups(architecture, 2))
    prefix = f"{architecture.model(0).base_model_prefix}."
    for name, path in {"base": base, **experts}.items():
        shutil.copytree(path, tmp_path / name)
        stripped = {n.removeprefix(prefix): t for n, t in tensors(path).items()}
        save_file(stripped, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    report = smile(Group.of(tmp_path / "base", {n: tmp_path / n for n in experts}), tmp_path / "out", rank=8)
    out, want = builds(architecture, 2, rank=8)
    model, same = load(tmp_path / "out"), load(out)
    assert report.modules == want.modules
    assert {r.name for r in report.rest} == {r.name.removeprefix(prefix) for r in want.rest}
    assert model.layout == same.layout
    assert torch.equal(logits(model), logits(same))
    built = tensors(tmp_path / "out")
    assert all(torch.equal(built[name], t) for name, t in tensors(tmp_path / "base").items())
