"""Routing traces against weights computed by hand, and the map that `upscale route` prints."""

import re

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from tests.architectures import TABLE
from tests.conftest import perturbed, save_model
from tests.reference import smile as reference
from tests.reference.models import block_linears, in_block, paths, plain, tensors
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
