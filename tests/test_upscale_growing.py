"""Experts added to a finished checkpoint and removed from it, against builds with and without them, byte for byte."""

import json

import pytest
import torch
import yaml
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import upscale
from tests.adapters import save_adapter
from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, every_file
from tests.cli_runs import upscale as command
from tests.conftest import perturbed, save_model
from tests.routers import random_router
from upscale import router_file
from upscale.building.rebuild import rebuild
from upscale.errors import ExpertError, RecipeError
from upscale.growing.extract import extract_lora
from upscale.growing.grow import add, remove
from zoo import Checkpoint, Group, MismatchError

LLAMA, QWEN2, MISTRAL, GPT2 = TABLE[:4]
FULL = 1000  # clamped: full rank


def part_of(group, *names):
    return Group(group.base, {name: group.experts[name] for name in names})


def section(out):
    return json.loads((out / "config.json").read_text())["upscale"]


def tensors(out):
    model = Checkpoint.open(out)
    return {name: model.read(name) for name in model.tensors}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """``zoo(architecture)``: a group of five, whose base is sharded; made once."""
    made = {}

    def group(architecture):
        if architecture.name not in made:
            root = tmp_path_factory.mktemp(architecture.name)
            base = save_model(architecture.model(seed=0), root / "base")
            (base / "model.safetensors").unlink()
            architecture.model(seed=0).save_pretrained(base, max_shard_size="60KB")
            tunes = {f"e{n}": save_model(perturbed(architecture, n), root / f"e{n}") for n in range(1, 6)}
            made[architecture.name] = Group.of(base, tunes)
        return made[architecture.name]

    return group


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        (LLAMA, {"rank": 8}),
        (QWEN2, {"energy": 0.8, "router_rank": 4}),  # a tied head, biases
        (
            GPT2,
            {"rank": 8, "dtype": "bfloat16", "seed": 3, "scope": "block"},
        ),  # weights the other way, norms with biases
        (
            QWEN2,
            {
                "rank": 4,
                "router_rank": 2,
                "rest": "base",
                "lm_head": True,
                "exact": True,
                "include": ("*mlp*", "lm_head"),
            },
        ),
    ],
    ids=["llama", "qwen2", "gpt2", "split-head"],
)
def test_a_fifth_expert_added_to_four_is_a_build_with_five_and_removed_again_one_with_four(
    architecture, options, zoo, tmp_path
):
    group, out, five = zoo(architecture), tmp_path / "out", tmp_path / "five"
    upscale.smile(part_of(group, "e1", "e2", "e3", "e4"), out, **options)
    upscale.smile(group, five, **options)
    four = every_file(out)
    if options.get("dtype"):  # what the base lost by it is not known any more: the delta is another one
        add(out, {"e5": group.experts["e5"].location})
    else:
        grown = add(out, {"e5": group.experts["e5"].location})
        assert every_file(out) == every_file(five)
        assert not grown.warnings
    remove(out, ["e5"])
    assert every_file(out) == four
    assert {path.name for path in tmp_path.iterdir()} == {"out", "five"}


@pytest.mark.parametrize("options", [{"rank": 24}, {"energy": 0.9}], ids=str)
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "embed_tokens"]], ids=["linears", "embedding"])
def test_adapters_come_and_go_like_fine_tunes(options, targets, tmp_path):
    """Of ranks of their own, below that of the settings; on an embedding whose tied head they part from it."""
    base = save_model(QWEN2.model(seed=0), tmp_path / "base")
    made = {
        f"a{n}": save_adapter(base, tmp_path / f"a{n}", n, r=4 * n, target_modules=targets if n == 1 else ["q_proj"])
        for n in (1, 2, 3)
    }
    made["full"] = save_model(perturbed(QWEN2, 4, names=lambda name: "mlp" in name), tmp_path / "full")
    group, out = Group.of(base, made), tmp_path / "out"
    upscale.smile(part_of(group, "a1", "a2"), out, **options)
    two = every_file(out)
    for count, name in enumerate(("a3", "full"), start=3):
        add(out, {name: made[name]})
        upscale.smile(part_of(group, *list(made)[:count]), built := tmp_path / f"built-{count}", **options)
        assert every_file(out) == every_file(built)
    remove(out, ["full", "a3"])
    assert every_file(out) == two


def test_modules_come_and_go_with_the_experts_that_changed_them(tmp_path):
    """Experts of different parts: no module of one is a module of the other."""
    parts = {
        "mlp": lambda name: ".0.mlp." in name,
        "biases": lambda name: "q_proj.bias" in name,
        "norms": lambda name: "layernorm" in name and ".1." in name,
        "tokens": lambda name: "embed" in name,
    }
    base = save_model(QWEN2.model(seed=0), tmp_path / "base")
    tunes = {
        part: save_model(perturbed(QWEN2, n, names=names), tmp_path / part)
        for n, (part, names) in enumerate(parts.items())
    }
    group, out = Group.of(base, tunes), tmp_path / "out"
    upscale.smile(part_of(group, "mlp"), out, rank=8)
    first = every_file(out)
    for count, part in enumerate(list(parts)[1:], start=2):
        add(out, {part: tunes[part]})
        upscale.smile(part_of(group, *list(parts)[:count]), built := tmp_path / f"built-{count}", rank=8)
        assert every_file(out) == every_file(built)
    assert section(out)["modules"]["lm_head"]["tied"] == "model.embed_tokens"
    remove(out, ["tokens", "norms", "biases"])
    assert every_file(out) == first
    # those before it gone, an expert is what it was, in a model of its own modules alone
    add(out, {"biases": tunes["biases"], "tokens": tunes["tokens"]})
    remove(out, ["mlp"])
    assert section(out)["modules"].keys() == {
        "model.embed_tokens",
        "lm_head",
        *(f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)),
    }
    forced = upscale.load(out, expert="biases")
    upscale.smile(part_of(group, "biases"), alone := tmp_path / "alone", rank=8)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(forced(ids).logits, upscale.load(alone, expert="biases")(ids).logits, atol=0, rtol=0)


def test_who_is_left_keeps_every_bit_and_the_recipe_rebuilds_it(zoo, tmp_path):
    group, out = zoo(MISTRAL), tmp_path / "out"
    upscale.smile(part_of(group, "e1", "e2", "e3"), out, rank=4, router_rank=2)
    before, made = tensors(out), section(out)
    remove(out, ["e1"])
    for name, module in section(out)["modules"].items():
        first = made["modules"][name]["ranks"][0]
        assert module["ranks"] == made["modules"][name]["ranks"][1:]
        for tensor in {f"{name}.experts.{kind}" for kind in ("down", "up", "scale")} & before.keys():
            kept = before[tensor][:, first:] if tensor.endswith("up") else before[tensor][first or 1 :]
            assert torch.equal(tensors(out)[tensor], kept)
    add(out, {"e5": group.experts["e5"].location}, rank=6)
    recipe = yaml.safe_load((out / "upscale.yaml").read_text())
    assert recipe["overrides"] == {"e2": {"seed": 1}, "e3": {"seed": 2}, "e5": {"rank": 6, "seed": 0}}
    assert {tuple(m["ranks"]) for m in section(out)["modules"].values() if any(m["ranks"])} == {(4, 4, 6)}
    rebuild(out / "upscale.yaml", tmp_path / "again")
    assert every_file(tmp_path / "again") == every_file(out)


def test_a_budget_is_shared_by_those_it_was_chosen_for(zoo, tmp_path):
    group, out = zoo(LLAMA), tmp_path / "out"
    upscale.smile(part_of(group, "e1", "e2"), out, budget="1.6x", router_rank=1)
    before = every_file(out)
    with pytest.raises(ExpertError, match=r"a budget of 1.6x among e1, e2; give the new ones a --rank or an --energy"):
        add(out, {"e3": group.experts["e3"].location})
    add(out, {"e3": group.experts["e3"].location}, energy=0.5)
    with pytest.raises(RecipeError, match="among e1, e2, and experts were added or removed since"):
        rebuild(out / "upscale.yaml", tmp_path / "again")
    remove(out, ["e3"])
    assert every_file(out) == before


@pytest.mark.parametrize("depth", [0, 1])
def test_a_calibrated_router_loses_a_class_exactly_and_sends_nothing_to_a_new_one(depth, zoo, tmp_path):
    group, out = zoo(LLAMA), tmp_path / "out"
    upscale.smile(part_of(group, "e1", "e2", "e3"), out, rank=4, router_rank=2)
    values = random_router(64 if depth else 259, depth=depth, classes=4)
    settings = {"type": "calibrated", "experts": 3, "size": 64 if depth else 259, "depth": depth, "base": True}
    settings |= {"granularity": "prefix", "top_k": None, "half_life": None}
    made = {"calibrated": {}, "prompts": {"e1": "1", "e2": "2", "e3": "3", "base": "0"}}
    router_file.replace(*router_file.opened(out), settings, values, made)
    before, ids = every_file(out), torch.arange(3, 60)[None]

    def decided():
        model = upscale.load(out)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        return model.routing.router, model.routing.router.decided, logits

    _, was, logits = decided()
    grown = add(out, {"e4": group.experts["e4"].location})
    assert "the router does not know e4 yet" in grown.warnings[0]
    _, now, same = decided()
    assert torch.equal(now[..., :3], was) and not now[..., 3].any()
    torch.testing.assert_close(same, logits, atol=1e-5, rtol=1e-5)
    remove(out, ["e4"])
    assert every_file(out) == before
    remove(out, ["e2"])
    router, fewer, _ = decided()
    for name, value in values.items():
        kept = value[:, [0, 2, 3]] if name == "table" else value[[0, 2, 3]]
        assert torch.equal(dict(router.named_parameters())[name], kept)
    torch.testing.assert_close(fewer, was[..., [0, 2]] / (1 - was[..., 1:2]), atol=1e-5, rtol=1e-5)
    assert yaml.safe_load((out / "upscale.yaml").read_text())["router"]["prompts"].keys() == {"e1", "e3", "base"}


def test_an_expert_with_a_head_or_a_vocabulary_of_its_own_arranges_the_others(tmp_path):
    base, tune = (
        save_model(model, tmp_path / n) for n, model in (("base", QWEN2.model(0)), ("e1", perturbed(QWEN2, 1)))
    )
    other = perturbed(QWEN2, 2)
    other.resize_token_embeddings(261, mean_resizing=False)
    with torch.no_grad():
        other.model.embed_tokens.weight[259:] = 1.0
        other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight + 0.1)
    other.config.tie_word_embeddings = False
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "e2")
    other.save_pretrained(tmp_path / "e2")
    out, ids = tmp_path / "out", torch.arange(3, 40)[None]
    upscale.smile(Group.of(base, {"e1": tune}), out, rank=FULL)
    with torch.no_grad():
        before = upscale.load(out, expert="e1")(ids).logits
        with pytest.raises(MismatchError, match="pass --vocabulary base"):
            add(out, {"e2": tmp_path / "e2"})
        add(out, {"e2": tmp_path / "e2"}, vocabulary="union")
        upscale.smile(
            Group.of(base, {"e1": tune, "e2": tmp_path / "e2"}, vocabulary="union"), tmp_path / "two", rank=FULL
        )
        ours, theirs = every_file(out), every_file(tmp_path / "two")
        # The old expert was factored before there were rows for new tokens: equal but for rounding.
        rounded = {"model.safetensors", "report.json", "checksums.json"}
        assert {n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)} <= rounded
        torch.testing.assert_close(upscale.load(out, expert="e1")(ids).logits[..., :259], before, atol=1e-5, rtol=1e-5)
        new = torch.tensor([[5, 259, 260, 7]])
        torch.testing.assert_close(upscale.load(out, expert="e2")(new).logits, other(new).logits, atol=1e-4, rtol=1e-4)


def test_classifiers_bring_and_take_their_heads(tmp_path):
    def saved(name, labels, seed):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
        )
        config.id2label = {n: f"{name}-{n}" for n in range(labels)}
        BertForSequenceClassification(config).save_pretrained(tmp_path / name)
        return tmp_path / name

    group = Group.of(saved("base", 2, 0), {name: saved(name, n, n) for n, name in enumerate("abc", start=2)})
    upscale.smile(part_of(group, "a", "b"), tmp_path / "out", rank=4, router_rank=2)
    upscale.smile(group, tmp_path / "built", rank=4, router_rank=2)
    before = every_file(tmp_path / "out")
    add(tmp_path / "out", {"c": tmp_path / "c"})
    assert every_file(tmp_path / "out") == every_file(tmp_path / "built")
    remove(tmp_path / "out", ["c"])
    assert every_file(tmp_path / "out") == before


def test_an_adapter_is_added_as_any_expert(zoo, tmp_path):
    group, out = zoo(LLAMA), tmp_path / "out"
    upscale.smile(part_of(group, "e1", "e2"), out, rank=8)
    extract_lora(out, "e2", tmp_path / "lora")
    grown = add(out, {"again": tmp_path / "lora"})
    assert not grown.warnings  # the base is the one that it names
    factors = tensors(out)
    for name, module in section(out)["modules"].items():
        if ".layers." in name and any(module["ranks"]):
            up, down = factors[f"{name}.experts.up"], factors[f"{name}.experts.down"]
            torch.testing.assert_close(up[:, 8:16] @ down[8:16], up[:, 16:] @ down[16:], atol=1e-5, rtol=1e-5)
    lora = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    (tmp_path / "lora/adapter_config.json").write_text(
        json.dumps({**lora, "base_model_name_or_path": group.experts["e1"].location})
    )
    result = command("add", out, f"other={tmp_path / 'lora'}")
    assert result.exit_code == 1
    assert_one_message(result.output, "whose weights are not those of")
