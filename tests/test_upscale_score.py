"""Log-likelihoods and routing of engines, against forward passes of one sequence at a time."""

import math

import pytest
import torch

from tests.architectures import TABLE
from tests.reference.models import dense, paths, plain
from tests.reference.scoring import ids_of, of_continuation, of_tokens
from tests.reference.server import loglikelihood, reverse_server
from upscale import load
from upscale.config import EvalConfig
from upscale.errors import EngineError
from upscale.evaluating.encoding import encode_pair, first_scored, windows
from upscale.evaluating.engines import TransformersEngine, open_engine
from upscale.evaluating.trace import trace
from upscale.loading import load_tokenizer

PAIRS = [
    ("a", " b"),
    ("what is 7 in roman numerals?", "VII"),
    ("what is 7 in roman numerals?", "é"),
    ("x" * 60, "y" * 40),
    ("", "a text alone, é"),
    ("q", "z"),
]


def scores_by_hand(model, pairs=PAIRS):
    return [(of_continuation(model, prompt, after), len(after.encode())) for prompt, after in pairs]


def close(got, want):
    assert [tokens for _, tokens in got] == [tokens for _, tokens in want]
    assert [value for value, _ in got] == pytest.approx([value for value, _ in want], abs=2e-4)


@pytest.fixture(scope="module")
def out(builds):
    return builds(TABLE[0], 3, rank=1000, router_rank=4, rest="base")[0]


# ------------------------------------------------------------------------------------------------------------- encoding
def test_a_token_across_the_border_counts_whole():
    class Merging:
        """Tokens are words with the space before them, so that a prompt's last space joins the continuation."""

        chat_template = None

        def __call__(self, text, add_special_tokens):
            ids = ["<s>"] * add_special_tokens + text.replace(" ", "\0 ").strip("\0").split("\0")
            return type("Encoding", (), {"input_ids": [i for i in ids if i]})

    whole = ["<s>", "the", " answer:", " Paris", " now"]
    assert encode_pair(Merging(), "the answer: ", "Paris now", chat=False) == (whole, 3)
    assert encode_pair(Merging(), "the answer:", " Paris now", chat=False) == (whole, 3)
    assert encode_pair(Merging(), "", "the answer: Paris now", chat=False) == (whole, 1)
    assert (first_scored([], [7, 8]), first_scored([7], [7, 8]), first_scored([9], [7, 8])) == (1, 1, 1)
    with pytest.raises(EngineError, match="no chat template"):
        encode_pair(Merging(), "p", "c", chat=True)
    assert encode_pair(Merging(), "", "a", chat=True) == (["<s>", "a"], 1)  # a bare text is no message


@pytest.mark.parametrize(
    ("first", "length", "want"),
    [
        (1, 10, [(0, 1, 10)]),
        (1, 11, [(0, 1, 10), (1, 10, 11)]),
        (1, 25, [(0, 1, 10), (9, 10, 19), (15, 19, 25)]),
        (20, 25, [(15, 20, 25)]),
        (12, 25, [(11, 12, 21), (15, 21, 25)]),
        (5, 5, []),
    ],
)
def test_windows_score_every_token_once_and_know_the_most(first, length, want):
    assert list(windows(first, length, context=10)) == want


# --------------------------------------------------------------------------------------------------------- transformers
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_scores_are_those_of_each_sequence_alone(architecture, builds, batch_size):
    directory, _ = builds(architecture, 3, rank=16, router_rank=4, top_k=2)
    engine, seen = open_engine(str(directory), EvalConfig(batch_size=batch_size)), []
    got = engine.score(PAIRS, seen.append)
    close(got, scores_by_hand(load(directory)))
    assert sum(seen) == len(PAIRS)
    engine.close()


def test_fewer_at_once_where_logits_fill_the_memory(out, monkeypatch):
    monkeypatch.setattr("upscale.evaluating.engines._LOGITS", 5000)  # 19 tokens of 259 logits
    engine, sizes = TransformersEngine(str(out), EvalConfig()), []
    run = engine._loglikelihoods
    engine._loglikelihoods = lambda rows, firsts: (
        sizes.append((len(rows), len(rows[-1]), min(firsts))) or run(rows, firsts)
    )
    close(engine.score(PAIRS, lambda _: None), scores_by_hand(load(out)))
    assert len(sizes) > 2 and sum(number for number, _, _ in sizes) == len(PAIRS)
    assert all(number == 1 or number * (longest - first + 1) * 259 <= 5000 for number, longest, first in sizes)


def test_a_long_text_is_read_in_windows(out):
    """The context is 256, of which engines use 255: windows written out, each in a pass of its own."""
    text, model = "".join(chr(97 + n * n % 26) for n in range(600)), load(out)
    ids = ids_of(text)
    want = sum(of_tokens(model, ids[b:e], f - b) for b, f, e in ((0, 1, 255), (254, 255, 509), (346, 509, 601)))
    prompted = ids_of(text + "abc")
    engine = open_engine(str(out), EvalConfig())
    got = engine.score([("", text), (text, "abc")], lambda _: None)
    close(got, [(want, 600), (of_tokens(model, prompted[-255:], 252), 3)])


def test_a_forced_expert_scores_as_its_fine_tune(out, groups):
    base, experts = paths(groups(TABLE[0], 3))
    engine = open_engine(str(out), EvalConfig())
    for expert, model in (("e2", dense(base, experts["e2"])), ("base", plain(base)), (None, load(out))):
        engine.force(expert)
        close(engine.score(PAIRS, lambda _: None), scores_by_hand(model))


def test_a_chat_message_is_scored_in_its_template(out):
    engine, model = open_engine(str(out), EvalConfig(chat=True)), load(out)
    got = engine.score([("hi", "there"), ("", "text")], lambda _: None)
    ids, text = ids_of("hi\nthere"), ids_of("text")  # the template is the message and a newline
    close(got, [(of_tokens(model, ids, 4), 5), (of_tokens(model, text, 1), 4)])


# -------------------------------------------------------------------------------------------------------------- routing
@pytest.mark.parametrize("batch_size", [2, 32])
def test_routes_are_the_traces_last_tokens(architecture, builds, batch_size):
    directory, _ = builds(architecture, 3, rank=16, router_rank=4, top_k=2, lm_head=True)
    prompts = [prompt for prompt, _ in PAIRS if prompt]
    engine = open_engine(str(directory), EvalConfig(batch_size=batch_size))
    routed = engine.route(prompts, chat=False)
    alone = [trace(directory, prompt) for prompt in prompts]
    assert (routed.tokens, routed.experts) == (prompts, ("e1", "e2", "e3"))
    assert routed.modules.keys() == alone[0].modules.keys()
    for name, weights in routed.modules.items():
        assert weights.shape == (len(prompts), 3)
        torch.testing.assert_close(weights, torch.stack([one.modules[name][-1] for one in alone]), atol=1e-4, rtol=0)
    assert engine.model.routing.trace is None


def test_routes_of_chat_and_of_what_is_longer_than_the_context(out):
    engine = open_engine(str(out), EvalConfig())
    long = "".join(chr(97 + n * n % 26) for n in range(400))
    for prompts, chat, seen in ((["hi"], True, "hi\n"), ([long], False, long[-254:])):  # the first token is <s>
        (weights,) = engine.route(prompts, chat=chat).overall
        torch.testing.assert_close(weights, trace(out, seen).overall[-1], atol=1e-4, rtol=0)


def test_a_plain_model_routes_nothing(groups):
    base, _ = paths(groups(TABLE[0], 3))
    assert open_engine(str(base), EvalConfig()).route(["a"], chat=False) is None


def test_generated_tokens_are_counted_to_the_first_end(out):
    engine = open_engine(str(out), EvalConfig(max_new_tokens=8))
    tails = torch.tensor([[5, 1, 2, 2], [5, 6, 7, 8], [1, 2, 2, 2]])  # 1 ends, 2 pads
    assert engine._until_end(tails) == 2 + 4 + 1
    engine.answer(["a", "b"], lambda _: None)
    assert 2 <= engine.generated <= 16


def test_a_tokenizer_without_a_start_token_leaves_the_first_token_out(out, tmp_path):
    """As in GPT-2's or Qwen's: nothing goes before the first token of a text, so nothing says how likely it is."""
    engine = TransformersEngine(str(out), EvalConfig())
    bare = load_tokenizer(out)
    engine.tokenizer = lambda text, add_special_tokens: bare(text, add_special_tokens=False)
    engine.tokenizer.pad_token_id = 2
    ids = ids_of("word", special=False)
    close(engine.score([("", "word")], lambda _: None), [(of_tokens(load(out), ids, 1), 3)])
    assert engine.score([("", "w")], lambda _: None) == [(0.0, 0)]


# --------------------------------------------------------------------------------------------------------------- server
@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with reverse_server() as running:
        yield running


def test_a_server_scores_by_echo(server):
    engine, seen = open_engine("reverse", EvalConfig(engine=server.url, batch_size=3)), []
    got = engine.score(PAIRS, seen.append)
    want = [
        (math.fsum(loglikelihood(whole[:n], whole[n]) for n in range(max(1, len(prompt)), len(whole))), len(whole))
        for prompt, whole in ((p, p + c) for p, c in PAIRS)
    ]
    counts = [length - max(1, len(prompt)) for (_, length), (prompt, _) in zip(want, PAIRS, strict=True)]
    close(got, [(value, count) for (value, _), count in zip(want, counts, strict=True)])
    assert sum(seen) == len(PAIRS)
    prompts = [asked["prompt"] for asked in server.asked]
    assert sorted(prompts) == sorted([p + c for p, c in PAIRS] + list({p for p, _ in PAIRS if p}))
    assert all(asked["echo"] and asked["logprobs"] == 1 and asked["temperature"] == 0.0 for asked in server.asked)


def test_what_a_server_cannot_score(server):
    with pytest.raises(EngineError, match="scores no continuation of a chat message"):
        open_engine("reverse", EvalConfig(engine=server.url, chat=True)).score(PAIRS, lambda _: None)
    with pytest.raises(EngineError, match="does not echo log-probabilities; it can answer, but not score"):
        open_engine("reverse", EvalConfig(engine=server.url)).score([("mute", "d")], lambda _: None)
    assert open_engine("reverse", EvalConfig(engine=server.url)).route(["a"], chat=False) is None
