"""Routing by the prefix or the prompt in transformers: exact under padding, caching, beams, cropping and continuing."""

import copy
import shutil
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, MistralConfig, OPTConfig

from tests.architectures import SHAPE, TABLE, Architecture
from tests.reference import routing as reference
from tests.reference.models import IDS, beam_search, blended, blocks, close, generate, logits, padded, paths, tensors
from tests.routers import copied, give_router, random_router
from upscale import load
from upscale.runtime.prefix_upscaled import running_mean

LLAMA = next(a for a in TABLE if a.name == "llama")
# Forgets keys and values, but not what the router has seen.
SLIDING = Architecture("sliding", lambda: MistralConfig(**SHAPE, sliding_window=6, tie_word_embeddings=False))
# Flattens sequences and tokens before some of its linears and norms.
OPT = Architecture(
    "opt",
    lambda: OPTConfig(
        vocab_size=259, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=64
    ),
)
GATES = {  # settings of calibrated routers
    "prompt": {"granularity": "prompt", "top_k": 1},
    "prompt-decayed": {"granularity": "prompt", "top_k": 2, "half_life": 3.0},
    "prefix": {"granularity": "prefix", "top_k": 1},
    "prefix-decayed": {"granularity": "prefix", "top_k": None, "half_life": 2.5},
    "prefix-1": {"granularity": "prefix", "depth": 1, "top_k": 2},
    "prefix-1-decayed": {"granularity": "prefix", "depth": 1, "top_k": None, "half_life": 4.0},
}
SCOPES = ("linear", "block", "model")
ROWS = [IDS[0, :5], IDS[1], IDS[0, 3:11]]


# -------------------------------------------------------------------------------------------------------- running means
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_running_mean_is_the_double_loop(data):
    rows, length, width = (data.draw(st.integers(1, most)) for most in (3, 20, 3))
    masks = [[0] * data.draw(st.integers(0, length)) for _ in range(rows)]  # left padding
    masks = [zeros + [data.draw(st.integers(0, 9)) > 0 for _ in range(length - len(zeros))] for zeros in masks]
    half_life = data.draw(st.none() | st.floats(0.1, 50))
    tokens = data.draw(st.integers(1, length))
    values = torch.randn(rows, length, width, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    got = running_mean(values, torch.tensor(masks, dtype=torch.float32).view(rows, length), tokens, half_life)
    want = [reference.running_mean(v.tolist(), m, half_life)[-tokens:] for v, m in zip(values, masks, strict=True)]
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("half_life", [None, 7.0, 300.0])
@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 600])
def test_running_mean_of_long_sequences(half_life, tokens):
    """Longer than what is weighed at once."""
    values, mask = torch.randn(2, 600, 1, generator=torch.Generator().manual_seed(3)), torch.ones(2, 600)
    mask[1, :40] = 0
    got = running_mean(values, mask, tokens, half_life)
    want = LONG.setdefault(half_life, [])
    if not want:
        want += [reference.running_mean(v.tolist(), m.tolist(), half_life) for v, m in zip(values, mask, strict=True)]
    torch.testing.assert_close(got, torch.tensor(want)[:, -tokens:], atol=1e-5, rtol=1e-4)


LONG = {}


# ------------------------------------------------------------------------------------------------------ routers by hand
@pytest.fixture(params=GATES)
def gate(request):
    return GATES[request.param]


@pytest.fixture
def gated(builds, tmp_path):
    """``gated(architecture, settings)``: a checkpoint of full rank with such a router of random scores."""

    def make(architecture, gate, tensors=None):
        config = architecture.config()
        tensors = tensors or random_router(config.hidden_size if gate.get("depth") else 259, gate.get("depth", 0))
        return give_router(copied(builds(architecture, 3, rank=1000)[0], tmp_path / "gated"), tensors, **gate)

    return make


def read_by_hand(base, experts, stored, gate):
    """``score(ids, prompt)``: logits of the base mixed with the fine-tunes by weights computed in plain loops."""
    held = {"w": None}
    model = blended(base, experts, held)
    (bias,), scores = ([t for n, t in stored.items() if n.endswith(part)] for part in ("bias", ("table", "weight")))
    settings = {"experts": 3, "top_k": gate["top_k"], "half_life": gate.get("half_life")}
    if gate.get("depth"):

        def enter(block, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            unit = hidden / hidden.square().mean(dim=-1, keepdim=True).sqrt()
            held["w"] = torch.stack([reference.gate(row @ scores[0].T, bias, **settings) for row in unit])

        blocks(model)[gate["depth"]].register_forward_pre_hook(enter, with_kwargs=True)

    @torch.no_grad()
    def score(ids, prompt=None):
        held["w"] = None
        if not gate.get("depth"):
            whole = {"prompt": ids.shape[1] if prompt is None else prompt} if gate["granularity"] == "prompt" else {}
            held["w"] = torch.stack([reference.gate(scores[0][row], bias, **settings, **whole) for row in ids])
        return model(input_ids=ids).logits

    score.held = held
    return score


def by_hand(architecture, groups, directory, gate):
    base, experts = paths(groups(architecture, 3))
    stored = {name: t for name, t in tensors(directory).items() if name.startswith("router.")}
    return read_by_hand(base, experts.values(), stored, gate)


def greedy(score, prompt, tokens=8):
    """New tokens [T] and the logits [T, V] that they were chosen by, from whole passes."""
    ids, said = prompt[None], []
    for _ in range(tokens):
        said.append(score(ids)[0, -1])
        ids = torch.cat([ids, said[-1].argmax()[None, None]], dim=1)
    return ids[0, len(prompt) :], torch.stack(said)


def test_calibrated_routing_is_the_plain_loops(architecture, groups, gated, gate):
    """A pass, and generating with a cache from a batch with left padding, against each sequence alone."""
    directory = gated(architecture, gate)
    model, score = load(directory), by_hand(architecture, groups, directory, gate)
    close(logits(model), score(IDS))
    assert gate["granularity"] == "prompt" or len(score.held["w"].flatten(0, 1).unique(dim=0)) > 2
    tokens, said = generate(model, *padded(ROWS))
    for n, row in enumerate(ROWS):
        want, want_said = greedy(partial(score, prompt=len(row)), row)
        assert torch.equal(tokens[n], want)
        close(said[n], want_said)


@pytest.mark.parametrize(
    ("scope", "granularity", "standardise"),
    [("linear", "token", True), ("linear", "prefix", False), ("block", "prefix", False), ("model", "token", False)],
)
def test_the_projection_routers_scopes_are_the_plain_loops(architecture, builds, scope, granularity, standardise):
    """Of every linear, from the input that it really had."""
    options = {"rank": 16, "router_rank": 4, "top_k": 2, "scope": scope, "granularity": granularity}
    model = load(builds(architecture, 3, **options, standardise=standardise)[0])
    linears = {n: m for n, m in model.layout.modules.items() if m.kind == "linear"}
    inputs = {}
    for name in linears:
        keep = lambda module, args, name=name: inputs.setdefault(name, args[0])  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(keep)
    model.routing.trace = {}
    logits(model)
    downs = {n: model.get_submodule(n).experts.down.detach().split(m.ranks) for n, m in linears.items()}
    for row in range(2):
        of_row = {name: x[row].double() for name, x in inputs.items()}
        ours = {n: [v.double() for v in down] for n, down in downs.items()}
        want = reference.projection(of_row, ours, 4, 2, scope, granularity, standardise)
        for name, w in want.items():
            torch.testing.assert_close(model.routing.trace[name][row], w, atol=1e-4, rtol=0, msg=name)


# ------------------------------------------------------------------------------------- the same, however it is computed
@pytest.fixture(params=[*GATES, *SCOPES])
def routed(request, builds, gated):
    """``routed(architecture)``: a checkpoint that routes by prefix or prompt, and its settings."""

    def make(architecture):
        if request.param in GATES:
            return gated(architecture, GATES[request.param]), GATES[request.param]
        return by_prefix(builds, architecture, request.param), {"granularity": "prefix"}

    return make


def by_prefix(builds, architecture, scope):
    return builds(architecture, 3, rank=16, router_rank=4, top_k=2, scope=scope, granularity="prefix")[0]


@pytest.mark.parametrize("architecture", [*TABLE, SLIDING], ids=lambda a: a.name, indirect=True)
@pytest.mark.parametrize("scope", SCOPES)
def test_evidence_over_the_prefix_is_that_of_whole_passes(architecture, builds, scope):
    """Cached generation from a batch with left padding, against whole passes of each sequence alone."""
    model = load(by_prefix(builds, architecture, scope))
    tokens, said = generate(model, *padded(ROWS))
    for n, row in enumerate(ROWS):
        ids = torch.cat([row, tokens[n]])[None]
        whole = logits(model, ids, use_cache=False)[0, len(row) - 1 : -1]
        close(said[n], whole)
        assert torch.equal(tokens[n], whole.argmax(dim=-1))
        step, cache = [], None
        with torch.no_grad():  # token by token from the first one
            for token in ids[0, :-1]:
                output = model(input_ids=token[None, None], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                step.append(output.logits[0, -1])
        close(torch.stack(step)[len(row) - 1 :], whole)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_model_that_flattens_its_tokens_mixes_no_sequences(builds, scope):
    model = load(by_prefix(builds, OPT, scope))
    alone = torch.cat([logits(model, row[None]) for row in IDS])
    close(logits(model), alone)
    close(logits(model, attention_mask=torch.ones_like(IDS)), alone)
    with model.force(["e1", "e3"]):
        mixed = logits(model)
    for n, name in enumerate(["e1", "e3"]):
        with model.force(name):
            close(mixed[n], logits(model)[n])


def whole_passes(model, groups, directory, gate, prompt):
    """``score(ids)`` of whole passes: by hand where the prompt's mean must be known, else by the model itself."""
    if gate["granularity"] == "prompt":
        return partial(by_hand(LLAMA, groups, directory, gate), prompt=prompt)
    return partial(logits, model, use_cache=False)


def test_beams_carry_their_means_with_them(routed, groups):
    directory, gate = routed(LLAMA)
    model, row = load(directory), IDS[1]
    found = model.generate(
        input_ids=row[None], num_beams=4, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=2
    )
    want = beam_search(whole_passes(model, groups, directory, gate, len(row)), row, beams=4, steps=6)
    assert torch.equal(found[0, len(row) :], want)
    assert not torch.equal(want, generate(model, row[None])[0][0, :6]) or gate != GATES["prefix"]  # beams did reorder


@pytest.mark.parametrize("configured", [True, False])
def test_a_cropped_cache_forgets(routed, groups, configured):
    """As assisted decoding does with drafts that it rejects; with a cache that knows the model's layers or does not."""
    directory, gate = routed(LLAMA)
    model = load(directory)
    cache = DynamicCache(config=model.config) if configured else DynamicCache()
    step = partial(logits, model, past_key_values=cache, use_cache=True)
    score = whole_passes(model, groups, directory, gate, 5)
    whole = score(IDS)
    close(step(IDS[:, :5]), whole[:, :5])
    step(IDS[:, :4].flip(1))  # drafts
    cache.crop(5)
    close(step(IDS[:, 5:9]), whole[:, 5:9])
    step(IDS[:, 3:4])
    cache.crop(-1)  # the last one
    close(step(IDS[:, 9:]), whole[:, 9:])
    cache.crop(7)
    cache.batch_repeat_interleave(2)  # as contrastive decoding does
    close(step(IDS[:, 7:9].repeat_interleave(2, 0)), whole[:, 7:9].repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([3, 0]))
    close(step(IDS[:, 9:].flip(0)), whole[:, 9:].flip(0))


def test_every_way_to_generate_finds_the_same_tokens(routed):
    directory, gate = routed(LLAMA)
    model = load(directory)
    row = torch.cat([IDS[0], IDS[0, :6]])[None]  # repeats itself, so that lookups find drafts
    tokens, said = generate(model, row)
    by_prefix = [{"prefill_chunk_size": 5}, {"use_cache": False}] if gate["granularity"] == "prefix" else []
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    for way in [{"prompt_lookup_num_tokens": 3}, *by_prefix]:
        assert torch.equal(model.generate(input_ids=row, **options, **way)[:, row.shape[1] :], tokens), way
    close(generate(copy.deepcopy(model), row)[1], said)
    first = model.generate(input_ids=row, **options, return_dict_in_generate=True)  # and a second turn after the first
    longer = torch.cat([first.sequences, IDS[1:]], dim=1)
    again = model.generate(input_ids=longer, past_key_values=first.past_key_values, **options)
    if gate["granularity"] == "prefix":
        assert torch.equal(again, model.generate(input_ids=longer, **options))


# --------------------------------------------------------------------------------------------------------- one decision
@pytest.mark.parametrize("half_life", [None, 3.0])
def test_a_prompts_expert_serves_all_of_it_and_its_answer(architecture, gated, half_life):
    """Bit for bit what forcing that expert gives, for a batch of prompts of different length."""
    gate = {"granularity": "prompt", "top_k": 1, "half_life": half_life}
    tensors = random_router(259, seed=4)
    model = load(gated(architecture, gate, tensors))
    names = []
    for row in ROWS:
        mean = torch.tensor(reference.running_mean(tensors["table"][row].tolist(), [1] * len(row), half_life)[-1])
        names.append(["e1", "e2", "e3", "base"][int((mean + tensors["bias"]).argmax())])
    assert len(set(names)) > 1
    ids, mask = padded(ROWS)
    tokens, said = generate(model, ids, mask)
    want, want_said = generate(model, ids, mask, expert=names)
    assert torch.equal(tokens, want)
    assert torch.equal(said, want_said)
    model.routing.trace = {}
    passed = model(input_ids=ids, attention_mask=mask)
    want = model.routing.one_hot(names)[:, None].expand(-1, ids.shape[1], -1)
    assert model.routing.trace.keys() == model.layout.modules.keys()
    for w in model.routing.trace.values():
        assert torch.equal(w, want)
    model.routing.trace = {}
    model(
        input_ids=tokens[:, :3],
        attention_mask=torch.cat([mask, torch.ones(3, 3)], 1),
        past_key_values=passed.past_key_values,
    )
    for w in model.routing.trace.values():
        assert torch.equal(w, want[:, :3])


# ---------------------------------------------------------------------------------------------------- change of subject
def test_a_decayed_mean_follows_a_change_of_subject_and_a_plain_one_does_not(gated):
    """Tokens below 100 speak of e1, the others of e2; 21 and 20 come, and 10 of the first kind again."""
    score = torch.zeros(259, 2)
    score[:100, 0] = score[100:, 1] = 4.0
    tensors = {"table": torch.cat([score, torch.zeros(259, 2)], dim=1), "bias": torch.zeros(4)}
    ids = torch.cat([torch.arange(20, 41), torch.arange(150, 170), torch.arange(60, 70)])[None]
    chosen = {}
    for half_life in (None, 4.0):
        model = load(gated(LLAMA, {"granularity": "prefix", "top_k": 1, "half_life": half_life}, tensors))
        model.routing.trace = {}
        logits(model, ids)
        for w in model.routing.trace.values():
            chosen.setdefault(half_life, w[0].argmax(dim=-1).tolist())
            assert chosen[half_life] == w[0].argmax(dim=-1).tolist()
        shutil.rmtree(model.name_or_path)
    assert chosen[None] == [0] * 51
    # After n tokens of another kind the old ones weigh 2^(-n/4) of what they did: half after 4.
    assert chosen[4.0] == [0] * (21 + 3) + [1] * 20 + [0] * 7


# ------------------------------------------------------------------------------------------------------------- mistakes
def test_what_cannot_be_averaged_is_said(gated):
    model = load(gated(LLAMA, GATES["prefix"]))
    embedded = model.get_input_embeddings()(IDS)
    with pytest.raises(ValueError, match="the router reads tokens: give the model input_ids, not inputs_embeds"):
        model(inputs_embeds=embedded)
    with pytest.raises(ValueError, match="needs a cache that grows, not a static one"):
        model.generate(input_ids=IDS, max_new_tokens=2, cache_implementation="static", pad_token_id=2)
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the attention mask covers 3 tokens, the router has seen 15"):
        model(input_ids=IDS[:, :3], attention_mask=torch.ones(2, 3), past_key_values=cache)


@pytest.mark.parametrize("granularity", ["prompt", "prefix"])
def test_a_half_model_routes_tokens_bit_for_bit_alike(gated, tmp_path, granularity):
    directory = gated(LLAMA, {"granularity": granularity, "top_k": None, "half_life": 5.0})
    full, half = load(directory), load(directory, dtype="bfloat16")
    half.save_pretrained(tmp_path / "saved")
    weights = []
    for model in (full, half, load(tmp_path / "saved")):
        model.routing.trace = {}
        assert torch.isfinite(logits(model)).all()
        weights.append(model.routing.trace)
    assert half.get_input_embeddings().weight.dtype == torch.bfloat16 and half.router.table.dtype == torch.float32
    for name, w in weights[0].items():
        assert all(torch.equal(others[name], w) for others in weights[1:])


def test_a_saved_copy_routes_alike(gated, gate, tmp_path):
    model = load(gated(LLAMA, gate))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert torch.equal(logits(load(tmp_path / "sharded")), logits(model))
    with model.force("e2"):
        want = logits(model)
    assert torch.equal(logits(load(tmp_path / "saved", expert="e2")), want)
    assert not torch.equal(logits(load(tmp_path / "saved", router=PROJECTION)), want)


PROJECTION = {"type": "projection", "rank": 4, "top_k": 1}
