"""Routing traces against weights computed by hand, and the map that `upscale route` prints."""

import re

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from tests.architectures import TABLE
from tests.conftest import perturbed, save_model
from tests.reference import routing as reference_routing
from tests.reference import smile as reference
from tests.reference.models import block_linears, in_block, paths, plain, tensors
from tests.routers import copied, give_router, random_router
from upscale import load, smile
from upscale.cli import main
from upscale.errors import LoadError
from upscale.evaluating.trace import trace
from zoo import Group

TEXT = "sort: pear é\n"  # a token a byte
IDS = [0, *(3 + byte for byte in TEXT.encode())]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_weights_are_those_computed_by_hand(architecture, builds, top_k):
    out, _ = builds(architecture, 3, rank=16, router_rank=4, top_k=top_k, rest="base")
    traced = trace(out, TEXT)
    model, stored = load(out), tensors(out)
    assert traced.experts == ("e1", "e2", "e3")
    assert set(traced.modules) == set(model.layout.modules)
    inputs = {}
    for name in traced.modules:
        keep = lambda module, args, name=name: inputs.update({name: args[0][0].double()})  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(input_ids=torch.tensor([IDS]))
    for name, w in traced.modules.items():
        ranks = model.layout.modules[name].ranks
        downs = stored[f"{name}.experts.down"].double().split(ranks)
        experts = [(down, None) for down in downs]
        want = torch.stack([reference.weights(x, experts, 4, top_k) for x in inputs[name]]).float()
        assert w.shape == (len(IDS), 3)
        torch.testing.assert_close(w, want, atol=1e-4, rtol=0)
        torch.testing.assert_close(w.sum(dim=1), torch.ones(len(IDS)))


def test_tokens_blocks_and_overall(architecture, builds):
    out = builds(architecture, 3, rank=16, router_rank=4, top_k=2)[0]
    traced = trace(out, TEXT)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert list(traced.tokens) == [tokenizer.decode([token]) for token in IDS]
    layout = load(out).layout.modules
    outside = [name for name in layout if not in_block(name)]
    assert traced.modules.keys() == layout.keys()
    for name, weights in traced.modules.items():  # what the projection router leaves idle, and what it routes
        assert torch.equal(weights.sum(dim=1).round(decimals=4), torch.full((len(IDS),), layout[name].kind == "linear"))
    inside = {name: weights for name, weights in traced.blocks.items() if name not in outside}
    assert traced.blocks.keys() - inside.keys() == set(outside)
    assert len(inside) == 2
    for number, (name, weights) in enumerate(inside.items()):
        assert name.endswith(f".{number}")
        of_block = [w for module, w in traced.modules.items() if module.startswith(f"{name}.")]
        torch.testing.assert_close(weights, sum(of_block) / len(of_block))
    torch.testing.assert_close(traced.overall, sum(traced.modules.values()) / len(traced.modules))


def test_the_head_is_a_row_of_its_own(builds):
    traced = trace(builds(TABLE[0], 2, rank=16, rest="base", lm_head=True)[0], "x")
    assert list(traced.blocks) == ["model.layers.0", "model.layers.1", "lm_head"]
    assert torch.equal(traced.blocks["lm_head"], traced.modules["lm_head"])


def test_chat_and_new_tokens(builds):
    out, _ = builds(TABLE[0], 3, rank=16, router_rank=4, top_k=2)
    prompt = torch.tensor([[0, *(3 + byte for byte in b"hi\n")]])
    chat = trace(out, "hi", chat=True)
    assert list(chat.tokens) == ["<s>", "h", "i", "\n"]
    longer = trace(out, "hi", chat=True, max_new_tokens=5)
    model = load(out)
    ids = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)[0]
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert list(longer.tokens) == [tokenizer.decode([token]) for token in ids]
    for name, weights in chat.modules.items():  # causal: later tokens change nothing
        torch.testing.assert_close(longer.modules[name][:4], weights, atol=1e-4, rtol=0)


# -------------------------------------------------------------------------------------------------- a calibrated router
@pytest.fixture
def gated(builds, tmp_path):
    """``gated(depth, granularity, top_k)``: a checkpoint with a calibrated router of random scores, and its tensors."""

    def make(depth, granularity, top_k=2):
        stored = random_router(64 if depth else 259, depth)
        directory = copied(builds(TABLE[0], 3, rank=16)[0], tmp_path / "gated")
        return give_router(directory, stored, depth=depth, granularity=granularity, top_k=top_k), stored

    return make


def prefix_means(scores):
    return torch.tensor(reference_routing.running_mean(scores.tolist(), [1] * len(scores)))


@pytest.mark.parametrize(("depth", "granularity"), [(0, "prompt"), (0, "prefix"), (1, "prefix")])
def test_confidence_is_the_routers_after_each_token(gated, groups, depth, granularity):
    """And weights are those of the prompt, then of its answer, as they are when it is generated."""
    directory, stored = gated(depth, granularity)
    traced = trace(directory, TEXT, max_new_tokens=4)
    model, base = load(directory), plain(groups(TABLE[0], 3).base.resolve())
    ids = torch.tensor([IDS])
    with torch.no_grad():
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        hidden = base(input_ids=whole, output_hidden_states=True).hidden_states[depth][0]
    unit = hidden / hidden.square().mean(dim=-1, keepdim=True).sqrt()
    means = prefix_means(unit @ stored["weight"].T if depth else stored["table"][whole[0]])
    assert traced.classes == ("e1", "e2", "e3", "base")
    torch.testing.assert_close(traced.confidence, (means + stored["bias"]).softmax(dim=-1), atol=1e-4, rtol=1e-4)
    decided = means[len(IDS) - 1].expand_as(means) if granularity == "prompt" else means
    p = (decided + stored["bias"]).softmax(dim=-1)
    want = torch.where(p >= p.topk(2).values[:, 1:], p, 0.0) / p.topk(2).values.sum(dim=-1, keepdim=True)
    for name, w in traced.modules.items():
        blocks = [int(part) for part in name.split(".") if part.isdigit()]
        before = depth and (name == "model.embed_tokens" or min(blocks, default=depth) < depth)
        torch.testing.assert_close(w, torch.zeros_like(w) if before else want[:, :3], atol=1e-4, rtol=1e-4, msg=name)


def test_route_shows_the_confidence(builds, tmp_path):
    """Letters speak of e1, digits of e3, the beginning and everything else of the base."""
    table = torch.eye(4)[3].repeat(259, 1)
    table[[3 + byte for byte in b"abc"]], table[[3 + byte for byte in b"123"]] = torch.eye(4)[0], torch.eye(4)[2]
    stored = {"table": 5 * table, "bias": torch.tensor([0.1, 0.0, 0.2, 0.0])}
    directory = copied(builds(TABLE[0], 3, rank=16)[0], tmp_path / "gated")
    give_router(directory, stored, granularity="prefix", top_k=1)
    result = CliRunner().invoke(main, ["route", str(directory), "abc !123123"])
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if line.strip()}
    assert rows["confidence"] == rows["overall"] == [*"-0000000", *"2222"]


def test_what_routes_nothing_is_refused(groups, builds, tmp_path):
    base, _ = paths(groups(TABLE[0], 3))
    with pytest.raises(LoadError, match="a plain model, which routes nothing"):
        trace(base, "x")
    smile(Group.of(base, {"same": base}), tmp_path / "same", rank=8)
    with pytest.raises(LoadError, match="every expert equals the base"):
        trace(tmp_path / "same", "x")
    with pytest.raises(LoadError, match=r"no config\.json"):
        trace(tmp_path, "x")
    out, _ = builds(TABLE[0], 3, rank=16)
    (tmp_path / "copy").mkdir()
    for path in out.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(LoadError, match="no chat template"):
        trace(tmp_path / "copy", "x", chat=True)


def test_route_prints_every_token_and_expert(builds):
    out, _ = builds(TABLE[0], 3, rank=16, router_rank=4, top_k=2)
    text = "Sort these: pear, apple and fig; then say why, at some length, so that lines must wrap."
    result = CliRunner().invoke(main, ["route", str(out), text])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    traced = trace(out, text)
    shares = traced.overall.mean(dim=0)
    assert re.findall(r"(\d) (\S+) (\d+)%", lines[0]) == [
        (str(n), name, f"{float(shares[n]):.0%}".rstrip("%")) for n, name in enumerate(traced.experts)
    ]
    label = len("model.embed_tokens") + 2
    rows = dict.fromkeys(("", *traced.blocks, "overall"), "")
    for line in lines[2:]:
        if line.strip():
            rows[line[:label].strip()] += line[label:]
    shown = "".join(token.replace(" ", "␣") for token in traced.tokens)
    assert rows[""].replace(" ", "") == shown
    for name, weights in {**traced.blocks, "overall": traced.overall}.items():
        assert rows[name].split() == [str(int(w.argmax())) if w.any() else "-" for w in weights]


def test_route_marks_tokens_that_no_expert_served(tmp_path):
    """Only biases changed: the router has nothing to go by, and no token goes anywhere."""
    qwen2 = next(a for a in TABLE if a.name == "qwen2")
    biases = {n for n in block_linears(qwen2.model(0)) if n.endswith("bias")}
    base = save_model(qwen2.model(0), tmp_path / "base")
    tunes = {f"e{n}": save_model(perturbed(qwen2, n, names=biases.__contains__), tmp_path / f"e{n}") for n in (1, 2)}
    smile(Group.of(base, tunes), tmp_path / "out", rank=8)
    assert torch.equal(trace(tmp_path / "out", "abc").overall, torch.zeros(4, 2))
    with torch.no_grad():
        ids = torch.tensor([IDS])
        assert torch.equal(load(tmp_path / "out")(input_ids=ids).logits, plain(base)(input_ids=ids).logits)
    result = CliRunner().invoke(main, ["route", str(tmp_path / "out"), "abc"])
    assert result.exit_code == 0, result.output
    assert re.search(r"^overall\s+-\s+-\s+-\s+-\s*$", result.output, re.MULTILINE)


def test_route_fails_in_one_line(groups):
    base, _ = paths(groups(TABLE[0], 3))
    result = CliRunner().invoke(main, ["route", str(base), "x"])
    assert result.exit_code == 1
    assert "a plain model, which routes nothing" in result.output
    assert "Traceback" not in result.output
