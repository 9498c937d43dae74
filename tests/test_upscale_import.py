"""FusionBench's SMILE checkpoints in our format: the same logits, and nothing that is not understood."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import upscale
from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, every_file
from tests.cli_runs import upscale as command
from tests.conftest import perturbed
from tests.reference import fusionbench
from upscale.errors import ConversionError, NonFiniteError
from upscale.importing.factors import factors, orthonormal
from upscale.importing.fusionbench import import_fusionbench
from upscale.runtime.layout_upscaled import Layout
from zoo.demo.tokenizer import save_tokenizer

BY_NAME = {architecture.name: architecture for architecture in TABLE}
UNTOUCHED, BY_FIRST = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"
CASES = {
    "low-rank": {"rank": 8, "router_rank": 4, "top_k": 1},
    "top-2": {"rank": 8, "router_rank": 4, "top_k": 2},
    "dense": {"rank": -1, "router_rank": 4, "top_k": 2},
    "one": {"rank": 8, "router_rank": 4, "top_k": 1},
    "wide-router": {"rank": 4, "router_rank": 8, "top_k": 1},
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def tune(architecture, seed: int):
    """A fine-tune that leaves one linear alone, and another to the first."""
    spared = (UNTOUCHED,) if seed == 1 else (UNTOUCHED, BY_FIRST)
    return perturbed(architecture, seed, names=lambda name: not name.startswith(spared))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved(architecture, case)``: a checkpoint as FusionBench saves it, with a tokenizer; made once."""
    made: dict[tuple[str, str], Path] = {}

    def save(name: str, case: str) -> Path:
        if (name, case) not in made:
            architecture, out = BY_NAME[name], tmp_path_factory.mktemp("smile") / "smile"
            tunes = [tune(architecture, seed) for seed in range(1, 2 if case == "one" else 4)]
            made[name, case] = fusionbench.save(architecture.model(seed=0), tunes, out, **CASES[case])
            save_tokenizer(out, max_length=256)
        return made[name, case]

    return save


def tokens() -> torch.Tensor:
    return torch.randint(3, 259, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def our_logits(out: Path, **options) -> torch.Tensor:
    return upscale.load(out, **options)(input_ids=tokens()).logits


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_logits_are_fusionbenchs(name, case, saved, tmp_path):
    source = saved(name, case)
    made = import_fusionbench(source, tmp_path / "out")
    expected = fusionbench.logits(source, tokens())
    torch.testing.assert_close(our_logits(tmp_path / "out"), expected, atol=1e-4, rtol=0)
    assert (our_logits(tmp_path / "out", expert="base") - expected).abs().max() > 0.1
    assert made.plain == [UNTOUCHED] and UNTOUCHED not in made.modules
    layout = Layout.from_config(json.loads((tmp_path / "out" / "config.json").read_text())["upscale"])
    for module, of_module in layout.modules.items():
        down = load_file(tmp_path / "out" / "model.safetensors")[f"{module}.experts.down"]
        for rows in down.split(of_module.ranks):
            torch.testing.assert_close(rows @ rows.mT, torch.eye(len(rows)), atol=1e-5, rtol=0)
    ranks = {"dense": made.modules[Q_PROJ], "wide-router": (8, 8, 8), "one": (8,)}.get(case, (8, 8, 8))
    assert made.modules[Q_PROJ] == ranks
    if case != "one":  # idle experts keep the directions by which FusionBench lets them win tokens
        assert made.modules[BY_FIRST][1:] == (CASES[case]["router_rank"],) * 2


def test_what_else_it_writes(saved, tmp_path):
    """The base's own configuration, the tokenizer, names; the command says so, and what is odd about the biases."""
    source = saved("qwen2", "low-rank")
    result = command("import", source, tmp_path / "out", "--names", "math,chat,code")
    assert result.exit_code == 0 and "--whole-biases" in result.output and "math, chat, code" in result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["base_model_type"] == "qwen2" and config["architectures"] == ["UpscaledQwen2ForCausalLM"]
    assert config["rope_theta"] == json.loads((source / "config.json").read_text())["rope_theta"]
    assert not config.keys() & {"num_experts_per_tok", "num_local_experts", "rank_of_expert", "rank_of_router"}
    assert config["upscale"]["experts"] == ["math", "chat", "code"]
    assert config["upscale"]["router"] == {"type": "projection", "rank": 4, "top_k": 1}
    recipe = yaml.safe_load((tmp_path / "out" / "upscale.yaml").read_text())
    assert recipe["imported"] == {"format": "fusionbench", "whole_biases": False} and recipe["method"] == "smile"
    assert recipe["base"] == recipe["experts"]["chat"] == str(source) and len(recipe["sha256"]["base"]) == 64
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`smile`, a base and 3 of its fine-tunes by SMILE upscaling, converted" in card and "| chat |" in card
    result = command("rebuild", tmp_path / "out" / "upscale.yaml", tmp_path / "rebuilt")
    assert_one_message(result.output, f"run `upscale import {source}` again")
    ours, theirs = every_file(tmp_path / "out"), every_file(source)
    assert all(ours[name] == theirs[name] for name in theirs if name.startswith(("tokenizer", "special_tokens")))
    plain = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".experts." not in name and not name.endswith((".gate.weight", "lm_head.weight")):
            torch.testing.assert_close(plain[name.replace(".shared_linear.", ".")], tensor, atol=0, rtol=0)
    again = import_fusionbench(source, tmp_path / "again", ["math", "chat", "code"])
    assert again.whole_biases and every_file(tmp_path / "again")["model.safetensors"] == ours["model.safetensors"]


def test_whole_biases_are_mended(saved, tmp_path):
    """An expert alone, at full rank, is then the fine-tune but for what FusionBench leaves to the base."""
    source = saved("qwen2", "low-rank")
    made = import_fusionbench(source, tmp_path / "out", whole_biases=True)
    assert not made.whole_biases
    base, expert = BY_NAME["qwen2"].model(seed=0).state_dict(), tune(BY_NAME["qwen2"], 2).state_dict()
    bias = load_file(tmp_path / "out" / "model.safetensors")[f"{Q_PROJ}.experts.bias"]
    torch.testing.assert_close(bias[1], expert[f"{Q_PROJ}.bias"] - base[f"{Q_PROJ}.bias"])
    dense = import_fusionbench(saved("qwen2", "dense"), tmp_path / "dense")
    assert not dense.whole_biases  # FusionBench stores differences there
    torch.testing.assert_close(load_file(tmp_path / "dense" / "model.safetensors")[f"{Q_PROJ}.experts.bias"], bias)


def test_shards_are_one_checkpoint(saved, tmp_path):
    source = saved("llama", "low-rank")
    shutil.copytree(source, split := tmp_path / "split")
    tensors = load_file(split / "model.safetensors")
    (split / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, split / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (split / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    outs = [tmp_path / "whole-out", tmp_path / "split-out"]
    for place, out in zip((source, split), outs, strict=True):
        import_fusionbench(place, out)
    assert len({every_file(out)["model.safetensors"] for out in outs}) == 1


def test_from_a_hub(hub, online, saved):
    """By commit into the recipe; what cannot be converted is refused before its weights are fetched."""
    files = every_file(saved("llama", "low-rank"))
    commit = hub.add("alice/smile", files)
    done = online("import", "alice/smile", "imported")
    assert done.exit_code == 0, done.output
    recipe = yaml.safe_load((online.directory / "imported" / "upscale.yaml").read_text())
    assert recipe["base"] == recipe["experts"]["expert_0"] == f"alice/smile@{commit}" and "sha256" not in recipe
    config = json.loads(files["config.json"]) | {"rank_of_router": 5}
    hub.add("alice/odd", {**files, "config.json": json.dumps(config).encode()})
    hub.behave()
    done = online("import", "alice/odd", "odd")
    assert_one_message(done.output, "num_local_experts 3 times rank_of_router 5 rows")
    assert [r.path for r in hub.requests if r.verb == "GET" and r.route == "lfs_get" and not r.range] == []


def scaled(tensors, name, factor):
    tensors[name] = tensors[name] * factor


BAD_TENSORS = [
    (lambda t: t.pop(f"{Q_PROJ}.experts.1.svh"), rf"lacks tensor {Q_PROJ}\.experts\.1\.svh, which"),
    (lambda t: t.pop("model.norm.weight"), r"lacks tensor model\.norm\.weight, which"),
    (lambda t: t.pop(f"{UNTOUCHED}.weight"), rf"lacks tensor {UNTOUCHED}\.weight, which"),
    (lambda t: t.pop(f"{Q_PROJ}.gate.weight"), r"lacks tensor model.*q_proj\.weight, which"),
    (lambda t: t.update({f"{Q_PROJ}.experts.3.u": torch.ones(2)}), r"has tensor .*q_proj\.experts\.3\.u, which"),
    (lambda t: t.update({f"{UNTOUCHED}.bias": torch.ones(2)}), rf"has tensor {UNTOUCHED}\.bias, which"),
    (lambda t: t.update({"gate.weights": torch.ones(2)}), r"has tensor gate\.weights, which"),
    (lambda t: t.update({f"{Q_PROJ}.gate.weight": torch.ones(9, 64)}), r"num_local_experts 3 times rank_of_router 4"),
    (lambda t: t.update({f"{Q_PROJ}.experts.0.u": torch.ones(9, 8)}), r"experts\.0\.u has shape \[9, 8\], not"),
    (
        lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
        r"model\.norm\.weight is torch\.int8",
    ),
    (lambda t: scaled(t, f"{Q_PROJ}.gate.weight", 1.01), rf"{Q_PROJ}\.gate\.weight: the rows of expert 0 are not"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS)
def test_tensors_that_are_not_understood(change, message, saved, tmp_path):
    shutil.copytree(saved("llama", "low-rank"), bad := tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    change(tensors)
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=message):
        import_fusionbench(bad, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "smile_gemma2"}, "FusionBench itself cannot build it"),
        ({"model_type": "llama"}, "not a SMILE model of FusionBench's"),
        ({"rank_of_router": None}, "no number rank_of_router"),
        ({"num_experts_per_tok": 4}, "no such router"),
        ({"num_local_experts": 0}, "no such router"),
        ({"num_hidden_layers": 3}, "lacks tensor model.layers.2"),
        ({"intermediate_size": 100}, "has shape"),
    ],
)
def test_configurations_that_are_not_understood(fields, message, saved, tmp_path):
    shutil.copytree(saved("llama", "low-rank"), bad := tmp_path / "bad")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | fields))
    result = command("import", bad, tmp_path / "out")
    assert result.exit_code == 1
    assert_one_message(result.output, message)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_other_refusals(saved, tmp_path):
    source = saved("llama", "low-rank")
    (tmp_path / "clip.bin").write_bytes(b"\x80\x04")
    for args, message in (
        ([tmp_path / "clip.bin"], "a pickled module, which runs code when it is read"),
        ([source, "--names", "a,b"], "has 3 experts, but 2 names were given"),
        ([source, "--names", "a,b,base"], "'base' is reserved"),
        ([source, "--names", "a,b,a"], "twice"),
        ([source, "--names", "a,b,../c"], "use letters"),
        ([source, "--whole-biases"], "no whole biases"),
        ([tmp_path / "absent here"], "no such directory"),
    ):
        result = command("import", args[0], tmp_path / "out", *args[1:])
        assert result.exit_code == 1
        assert_one_message(result.output, message)
    shutil.copytree(source, bad := tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    tensors[f"{Q_PROJ}.experts.2.u"][0, 0] = torch.nan
    save_file(tensors, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=rf"tensor {Q_PROJ}\.experts\.2\.u"):
        import_fusionbench(bad, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"bad", "clip.bin"}


@given(
    o=st.integers(1, 20),
    i=st.integers(6, 20),
    k=st.integers(1, 12),
    g=st.integers(0, 6),
    seed=st.integers(0, 999),
    own=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=60, deadline=None)
def test_factors_of_any_expert_and_gate(o, i, k, g, seed, own, dtype):
    """The gate's rows come first, all rows are orthonormal, the product stays; a gate of SMILE's own adds nothing."""
    generator = torch.Generator().manual_seed(seed)
    u, s, vh = torch.linalg.svd(torch.randn(o, i, generator=generator), full_matrices=False)
    k = min(k, len(s))
    gate = torch.linalg.qr(torch.randn(i, g, generator=generator)).Q.mT
    if own:
        gate = vh[:g]
    left, right, gate = u[:, :k].to(dtype), (s[:k, None] * vh[:k]).to(dtype), gate.to(dtype)
    assert orthonormal(gate) and not (g and orthonormal(1.1 * gate))
    down, up = factors(left, right, gate)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(down[: len(gate)], gate.float(), atol=0, rtol=0)
    torch.testing.assert_close(down @ down.mT, torch.eye(len(down)), atol=1e-5 + 4 * eps, rtol=0)
    product = left.float() @ right.float()
    assert (up @ down - product).norm() <= (1e-5 + 4 * eps) * product.norm()
    assert len(down) == max(k, len(gate)) if own else len(down) <= min(len(gate) + k, i)
