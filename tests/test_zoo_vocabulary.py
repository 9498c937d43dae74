"""Groups whose models have other vocabularies, and heads that some tie."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tests.architectures import TABLE
from tests.conftest import perturbed, save_model
from tests.reference.models import IDS, close, logits
from upscale import load, smile
from zoo import CheckpointError, Group, check

LLAMA, QWEN2, GPT2 = (next(row for row in TABLE if row.name == name) for name in ("llama", "qwen2", "gpt2"))
HALF = torch.bfloat16


def grown(row, seed: int, directory: Path, tokens: dict[int, str], rows: int, dtype=torch.float32) -> Path:
    """A fine-tune of ``rows`` embeddings whose tokenizer has tokens of its own."""
    model = perturbed(row, seed)
    model.resize_token_embeddings(rows, mean_resizing=False)
    save_model(model.to(dtype), directory)
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] += [
        {"id": n, "content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
        | {"single_word": False}
        for n, text in tokens.items()
    ]
    file.write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module", params=[LLAMA, QWEN2, GPT2], ids=lambda row: row.name)
def models(request, tmp_path_factory) -> dict[str, Path]:
    """A base of 259 rows; experts of 261, of 262 (a token that both have, a row without a name), of 200."""
    root, row = tmp_path_factory.mktemp("vocabulary"), request.param
    return {
        "base": save_model(row.model(seed=0), root / "base"),
        "chat": grown(row, 1, root / "chat", {259: "<|start|>", 260: "<|end|>"}, 261),
        "tool": grown(row, 2, root / "tool", {259: "<|end|>", 260: "<|call|>"}, 262, HALF),
        "short": grown(row, 3, root / "short", {}, 200),
        "plain": save_model(perturbed(row, 4), root / "plain"),
    }


def group(models, vocabulary=None, *names) -> Group:
    chosen = {name: path for name, path in models.items() if name != "base" and (not names or name in names)}
    return Group.of(models["base"], chosen, vocabulary=vocabulary)


def embedding(state: dict) -> torch.Tensor:
    return next(t for n, t in state.items() if n.endswith(("embed_tokens.weight", "wte.weight")))


def test_differences_are_refused_by_name_until_one_says_what_counts(models):
    lines = check(group(models)).mismatches
    assert [line.split(":")[0] for line in lines] == ["expert chat", "expert tool", "expert short"]
    assert "261 rows in" in lines[0] and "the base has 259 (it adds <|start|>, <|end|>)" in lines[0]
    assert all("pass --vocabulary base to keep the base's rows, or --vocabulary union" in line for line in lines)


def test_the_base_s_rows(models, tmp_path):
    """Of the others the rows that both have; what an expert lacks is the base's."""
    smile(group(models, "base"), tmp_path / "out", rank=999)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 259
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (models["base"] / "tokenizer.json").read_bytes()
    ids = IDS.clamp_max(199)
    for name in ("chat", "short", "plain"):
        rows = 200 if name == "short" else 259
        got = logits(load(tmp_path / "out", expert=name), ids)
        close(got[..., :rows], logits(load(models[name]), ids)[..., :rows])


def test_the_union_keeps_every_row_and_every_token_once(models, tmp_path):
    out = tmp_path / "out"
    verdict = check(group(models, "union"))
    assert verdict.mismatches == ()
    # Numbered as they come, as tokenizers do it; tool's row 261, which has no name, comes last.
    assert dict(verdict.added) == {259: "<|start|>", 260: "<|end|>", 261: "<|call|>"}
    smile(group(models, "union"), out, rank=999)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 263
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("<|start|>a<|end|><|call|>", add_special_tokens=False).ids[::2] == [259, 260]
    assert {text: tokenizer.token_to_id(text) for text in ("<|start|>", "<|end|>", "<|call|>")} == {
        "<|start|>": 259,
        "<|end|>": 260,
        "<|call|>": 261,
    }
    places = {"chat": {259: 259, 260: 260}, "tool": {260: 259, 261: 260, 262: 261}}
    for name, added in places.items():
        to = [*range(259), *added]
        of = [*range(259), *added.values()]
        ours, theirs = IDS.clone(), IDS.clone()
        ours[0, : len(added)], theirs[0, : len(added)] = torch.tensor(list(added)), torch.tensor(list(added.values()))
        got = logits(load(out, expert=name, dtype="float32"), ours)[..., to]
        close(got, logits(load(models[name], dtype="float32"), theirs)[..., of], 1e-4 if name == "chat" else 3e-2)


def test_an_expert_s_own_end_of_an_answer_is_one_of_the_union(models, tmp_path):
    ended = shutil.copytree(models["tool"], tmp_path / "ended")
    (ended / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 260]}))
    smile(group({**models, "tool": ended}, "union", "chat", "tool"), tmp_path / "out", rank=8)
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [1, 261]


def test_the_base_has_the_mean_of_the_rows_that_experts_added(models, tmp_path):
    smile(group(models, "union", "chat", "tool"), tmp_path / "out", rank=8)
    state = {n: t for f in sorted((tmp_path / "out").glob("*.safetensors")) for n, t in load_file(f).items()}
    base, chat, tool = (embedding(load_file(models[n] / "model.safetensors")) for n in ("base", "chat", "tool"))
    got = embedding(state)
    assert torch.equal(got[:259], base)
    wanted = {259: chat[259], 260: (chat[260] + tool[259].float()) / 2, 261: tool[260], 262: tool[261]}
    for row, want in wanted.items():
        torch.testing.assert_close(got[row], want.float(), atol=1e-7, rtol=0)


def test_rows_without_a_tokenizer_are_kept_as_they_are(models, tmp_path):
    bare = save_model(LLAMA.model(seed=0), tmp_path / "base"), grown(LLAMA, 1, tmp_path / "e", {}, 264)
    for path in bare:
        for file in path.glob("tokenizer*"):
            file.unlink()
    smile(Group.of(bare[0], {"e": bare[1]}, vocabulary="union"), tmp_path / "out", rank=999)
    ids = torch.tensor([[5, 263, 260, 7]])
    close(logits(load(tmp_path / "out", expert="e"), ids), logits(load(bare[1]), ids))


def test_a_tokenizer_that_cannot_be_extended_is_refused(models, tmp_path):
    base = save_model(LLAMA.model(seed=0), tmp_path / "base")
    (base / "tokenizer.json").rename(base / "tokenizer.model")
    expert = grown(LLAMA, 1, tmp_path / "e", {259: "<|new|>"}, 260)
    with pytest.raises(CheckpointError, match=r"no tokenizer.json that the experts' tokens could be added to; pass"):
        check(Group.of(base, {"e": expert}, vocabulary="union"))


def test_tokens_in_the_base_s_padding_are_told(tmp_path):
    base = save_model(LLAMA.model(seed=0), tmp_path / "base")
    expert = grown(LLAMA, 1, tmp_path / "e", {250: "<|tool|>"}, 259)
    warnings = check(Group.of(base, {"e": expert})).warnings
    assert "expert e: tokens of its own: <|tool|> (250)" in warnings


def untied(row, seed: int, directory: Path) -> Path:
    model = perturbed(row, seed)
    model.config.tie_word_embeddings = False
    head = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
    head.weight.data = model.lm_head.weight.detach() + 0.1 * torch.randn_like(model.lm_head.weight)
    model.lm_head = head
    return save_model(model, directory)


@pytest.mark.parametrize("base_is_tied", [True, False])
def test_tied_and_untied_heads_in_one_group(base_is_tied, tmp_path):
    tied = {"a": save_model(perturbed(QWEN2, 1), tmp_path / "a"), "b": save_model(perturbed(QWEN2, 2), tmp_path / "b")}
    other = untied(QWEN2, 3, tmp_path / "c")
    if base_is_tied:
        base, experts = save_model(QWEN2.model(seed=0), tmp_path / "base"), {**tied, "c": other}
    else:
        base, experts = other, tied
    assert "heads are tied in some models" in check(Group.of(base, experts)).warnings[0]
    smile(Group.of(base, experts), tmp_path / "out", rank=999)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert not config["tie_word_embeddings"]
    for name, path in {**experts, "base": base}.items():
        close(logits(load(tmp_path / "out", expert=name)), logits(load(path)))
