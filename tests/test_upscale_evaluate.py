"""Evaluation of models on tasks: against generation and passes by hand, and a real HTTP server in a thread."""

import math
from http.server import ThreadingHTTPServer

import pytest
import torch
from transformers import AutoTokenizer

from tests.architectures import TABLE
from tests.conftest import perturbed, save_model
from tests.reference.models import block_linears, dense, paths, plain, tensors
from tests.reference.scoring import of_continuation
from tests.reference.server import Handler, reverse_server
from upscale import evaluate, load, smile
from upscale.config import EvalConfig
from upscale.errors import ConfigError, EngineError, LoadError, TaskError
from upscale.evaluating.engines import open_engine
from upscale.evaluating.metrics import interval
from upscale.evaluating.tasks import Row, Task
from upscale.evaluating.trace import trace
from zoo import Group

PROMPTS = ["a", "what is 7 in roman numerals?", "sort: pear é fig", "bcd", "x" * 40]


@pytest.mark.parametrize(
    "options",
    [
        {"limit": 0},
        {"batch_size": 0},
        {"max_new_tokens": 0},
        {"metric": "bleu"},
        {"oracle": True, "expert": "e1"},
        {"dtype": "int8"},
        {"prompt_template": "no place"},
        {"chat": True, "prompt_template": "Q: {prompt}"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"--{next(iter(options)).replace('_', '-')}"):
        EvalConfig(**options)


# --------------------------------------------------------------------------------------------------------- transformers
def by_hand(model, directory, prompts, new=8, end=b""):
    """Greedy answers one at a time, from token ids spelled out: <s>, then a token a byte."""
    tokenizer, answers = AutoTokenizer.from_pretrained(directory), []
    for prompt in prompts:
        ids = torch.tensor([[0, *(3 + byte for byte in prompt.encode() + end)]])
        with torch.no_grad():
            for _ in range(new):
                token = int(model(input_ids=ids).logits[0, -1].argmax())
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
                if token == 1:
                    break
        answers.append(tokenizer.decode(ids[0, 1 + len(prompt.encode() + end) :], skip_special_tokens=True))
    return answers


def half_right(name, prompts, answers):
    """A task of which the model that gave ``answers`` gets every second row right."""
    pairs = enumerate(zip(prompts, answers, strict=True))
    return Task(name, [Row(prompt, answer + "?" * (n % 2)) for n, (prompt, answer) in pairs])


@pytest.fixture(scope="module")
def out(builds):
    return builds(TABLE[0], 3, rank=1000, router_rank=4, rest="base")[0]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_transformers_answers_are_generation_by_hand(architecture, builds, batch_size):
    directory, _ = builds(architecture, 3, rank=16, router_rank=4, top_k=2)
    engine, seen = open_engine(str(directory), EvalConfig(max_new_tokens=8, batch_size=batch_size)), []
    answers = engine.answer(PROMPTS, seen.append)
    assert answers == by_hand(load(directory), directory, PROMPTS)
    assert sum(seen) == len(PROMPTS)
    engine.close()


def test_scores_count_right_rows_and_progress_counts_all(out):
    answers, seen = by_hand(load(out), out, PROMPTS), []
    tasks = [half_right("t", PROMPTS, answers), half_right("u", PROMPTS[:2], answers[:2])]
    results = evaluate({"m": out, "again": str(out)}, tasks, max_new_tokens=8, progress=lambda *s: seen.append(s))
    assert [(r.model, r.task, r.score, r.n) for r in results] == [
        (model, task, score, n) for model in ("m", "again") for task, score, n in (("t", 3 / 5, 5), ("u", 1 / 2, 2))
    ]
    assert seen[-1] == (14, 14, "again on u")
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    (limited,) = evaluate({"m": out}, tasks[:1], max_new_tokens=8, limit=1)
    assert (limited.score, limited.n) == (1.0, 1)
    loose = [Task("t", [Row(PROMPTS[1], answers[1][2:5])])]
    (contained,) = evaluate({"m": out}, loose, max_new_tokens=8, metric="contains")
    assert (contained.metric, contained.score) == ("contains", 1.0)


def test_template_and_chat_decide_the_prompt(out):
    model = load(out)
    framed = [f"Q:\t{prompt}\nA:" for prompt in PROMPTS]
    for options, answers in (
        ({"prompt_template": "Q:\\t{prompt}\\nA:"}, by_hand(model, out, framed)),
        ({"chat": True}, by_hand(model, out, PROMPTS, end=b"\n")),
    ):
        task = Task("t", [Row(p, a) for p, a in zip(PROMPTS, answers, strict=True)])
        (result,) = evaluate({"m": out}, [task], max_new_tokens=8, **options)
        assert result.score == 1.0


def test_auto_forces_the_expert_named_like_the_task(out, groups):
    base, experts = paths(groups(TABLE[0], 3))
    tunes = {name: dense(base, path) for name, path in experts.items()} | {"base": plain(base)}
    tasks = [
        Task(n, [Row(p, a) for p, a in zip(PROMPTS, by_hand(t, out, PROMPTS), strict=True)]) for n, t in tunes.items()
    ]
    results = evaluate({"m": out}, tasks, max_new_tokens=8, expert="auto")
    assert [(r.task, r.expert, r.score) for r in results] == [(name, name, 1.0) for name in tunes]
    for result in evaluate({"m": out}, tasks, max_new_tokens=8, expert="e2"):
        assert result.expert == "e2"
        assert (result.score == 1.0) == (result.task == "e2")


def test_what_a_user_can_get_wrong(out, groups, tmp_path):
    task, base = Task("t", [Row("p", "c")]), paths(groups(TABLE[0], 3))[0]
    with pytest.raises(TaskError, match="no model to evaluate"):
        evaluate({}, [task])
    with pytest.raises(EngineError, match="no engine 'abacus'; there are transformers"):
        evaluate({"m": out}, [task], engine="abacus")
    with pytest.raises(LoadError, match="no expert t in this model; it has e1, e2, e3 and base"):
        evaluate({"m": out}, [task], expert="auto")
    with pytest.raises(LoadError, match="no experts to choose 'e1' from; it is a plain model"):
        evaluate({"m": base}, [task], expert="e1")
    with pytest.raises(LoadError, match=r"no config\.json"):
        evaluate({"m": tmp_path}, [task])
    perturbed(TABLE[0], 1).save_pretrained(tmp_path / "mute")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / file).write_bytes((base / file).read_bytes())
    with pytest.raises(EngineError, match="no chat template; use --prompt-template"):
        evaluate({"m": tmp_path / "mute"}, [task], chat=True)


# --------------------------------------------------------------------------------------------------------------- server
@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with reverse_server() as running:
        yield running


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_server_is_asked_greedily_and_answers_keep_their_order(server, end):
    prompts = [f"{n} prompt" for n in range(40)]
    task = Task("t", [Row(p, p[::-1][:5]) for p in prompts])
    (result,) = evaluate({"m": "reverse"}, [task], engine=server.url + end, max_new_tokens=5, batch_size=7)
    assert (result.score, result.n, result.engine) == (1.0, 40, server.url + end)
    assert sorted(asked["prompt"] for asked in server.asked) == sorted(prompts)
    assert all((a["model"], a["temperature"], a["max_tokens"]) == ("reverse", 0.0, 5) for a in server.asked)


def test_a_server_is_asked_in_chat(server):
    task = Task("t", [Row("abc", "chat cba"), Row("xyz", "zyx")])
    (result,) = evaluate({"m": "reverse"}, [task], engine=server.url, chat=True)
    assert result.score == 0.5
    asked = sorted(a["messages"][0]["content"] for a in server.asked)
    assert asked == ["abc", "xyz"]
    assert all(a["messages"][0]["role"] == "user" and len(a["messages"]) == 1 for a in server.asked)


def test_what_a_server_cannot_do(server):
    task = Task("t", [Row("p", "p")])
    with pytest.raises(EngineError, match=r"serves reverse, not forward"):
        evaluate({"m": "forward"}, [task], engine=server.url)
    with pytest.raises(EngineError, match="expert cannot be forced by a client"):
        evaluate({"m": "reverse"}, [task], engine=server.url, expert="e1")
    with pytest.raises(EngineError, match=f"{server.url}.*too rude"):
        evaluate({"m": "reverse"}, [Task("t", [Row("refuse", "")])], engine=server.url)


def test_a_server_that_is_down_is_named(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}"
    with pytest.raises(EngineError, match=f"{url}: no OpenAI-compatible server answers"):
        evaluate({"m": "reverse"}, [Task("t", [Row("p", "p")])], engine=url)


# ----------------------------------------------------------------------------------------------------- kinds and fields
CHOICES = [Row(p, c[n % 3], c) for n, p in enumerate(PROMPTS) for c in [("yes", "no, never", "x" * (n + 1))]]
LABELS = [Row(p, ("up", "down")[n % 2], ("down", "up")) for n, p in enumerate(PROMPTS)]
TEXTS = [Row("", text) for text in ("a text of some length", "été", "x")]


def test_every_kind_in_one_run(out):
    model = load(out)
    tasks = [Task("c", CHOICES, "choice"), Task("l", LABELS, "label"), Task("t", TEXTS, "text")]
    tasks.append(half_right("g", PROMPTS, by_hand(model, out, PROMPTS)))
    seen = []
    results = {
        r.task: r for r in evaluate({"m": out}, tasks, max_new_tokens=8, progress=lambda *step: seen.append(step))
    }
    assert [(r.task, r.metric, r.n) for r in results.values()] == [
        *(("c", "accuracy", 5), ("l", "accuracy", 5), ("t", "perplexity", 3), ("g", "exact_match", 5))
    ]
    assert seen[-1] == (3 * 5 + 2 * 5 + 3 + 5, 3 * 5 + 2 * 5 + 3 + 5, "m on g")
    for name, rows in (("c", CHOICES), ("l", LABELS)):
        result, right, normed, own = results[name], 0, 0, []
        for row, mark in zip(rows, result.rows, strict=True):
            values = [of_continuation(model, row.prompt, choice) for choice in row.choices]
            best = row.choices[values.index(max(values))]
            per_character = [value / len(choice) for value, choice in zip(values, row.choices, strict=True)]
            right += best == row.completion
            normed += row.choices[per_character.index(max(per_character))] == row.completion
            own.append(values[row.choices.index(row.completion)])
            assert mark["answer"] == best
            assert mark["loglikelihoods"] == pytest.approx(values, abs=2e-4)
        assert (result.score, result.others["accuracy_norm"]) == (right / 5, normed / 5)
        assert result.others["loglikelihood"] == pytest.approx(sum(own) / 5, abs=1e-4)
    sums = [of_continuation(model, "", row.completion) for row in TEXTS]
    lengths = [len(row.completion.encode()) for row in TEXTS]  # tokens are bytes here
    assert results["t"].score == pytest.approx(math.exp(-sum(sums) / sum(lengths)), rel=1e-4)
    assert results["t"].others == {"byte_perplexity": pytest.approx(results["t"].score)}
    assert [(mark["tokens"], mark["bytes"]) for mark in results["t"].rows] == [(n, n) for n in lengths]
    assert (results["g"].score, results["g"].others) == (3 / 5, {"contains": 3 / 5})
    for result in results.values():
        assert (result.low, result.high) == interval(result.metric, result.rows)
        assert result.low <= result.score <= result.high
        assert (result.generated is None) == (result.task != "g")
    assert 5 <= results["g"].generated <= 40


def test_a_template_frames_prompts_but_no_texts(out):
    tasks = [Task("c", CHOICES, "choice"), Task("t", TEXTS, "text")]
    framed, plainly = evaluate({"m": out}, tasks, prompt_template="Q: {prompt}\\n"), evaluate({"m": out}, tasks)
    want = [of_continuation(load(out), f"Q: {CHOICES[1].prompt}\n", choice) for choice in CHOICES[1].choices]
    assert framed[0].rows[1]["loglikelihoods"] == pytest.approx(want, abs=2e-4)
    assert framed[1].score == plainly[1].score


def test_a_metric_is_used_where_it_applies(out):
    answers = by_hand(load(out), out, PROMPTS)
    rows = [Row(p, a, tuple(sorted(set(answers)))) for p, a in zip(PROMPTS, answers, strict=True)]
    tasks = [Task("l", rows, "label"), Task("c", CHOICES, "choice"), half_right("g", PROMPTS, answers)]
    results = evaluate({"m": out}, tasks, metric="exact_match", max_new_tokens=8)
    assert [(r.metric, r.score) for r in results if r.task != "c"] == [("exact_match", 1.0), ("exact_match", 3 / 5)]
    (normed,) = evaluate({"m": out}, tasks[1:2], metric="accuracy_norm")
    assert (normed.score, normed.metric) == (results[1].others["accuracy_norm"], "accuracy_norm")
    with pytest.raises(TaskError, match="--metric perplexity applies to none of the tasks, which are of kind choice"):
        evaluate({"m": out}, tasks[1:2], metric="perplexity")


@pytest.mark.parametrize("name", ["e2", "other"])
def test_where_prompts_went(builds, name):
    directory, _ = builds(TABLE[0], 3, rank=16, router_rank=4, top_k=2)
    (result,) = evaluate({"m": directory}, [Task(name, [Row(p, "c") for p in PROMPTS])], max_new_tokens=1)
    traces = [trace(directory, prompt) for prompt in PROMPTS]
    chosen = [t.experts[int(sum(w[-1] for w in t.modules.values()).argmax())] for t in traces]
    assert [mark["expert"] for mark in result.rows] == chosen
    assert result.routes.shares == {expert: chosen.count(expert) / 5 for expert in sorted(set(chosen))}
    assert result.routes.accuracy == (chosen.count("e2") / 5 if name == "e2" else None)
    assert result.routes.experts == ["e1", "e2", "e3"]
    for block, weights in result.routes.blocks.items():
        assert weights == pytest.approx((sum(t.blocks[block][-1] for t in traces) / 5).tolist(), abs=1e-4)
    (forced,) = evaluate({"m": directory}, [Task("e2", [Row("p", "c")])], max_new_tokens=1, expert="e1")
    assert forced.routes is None and "expert" not in forced.rows[0]


def test_what_goes_to_no_expert_goes_to_the_base(tmp_path):
    """Only biases changed: the router has nothing to go by."""
    qwen2 = next(a for a in TABLE if a.name == "qwen2")
    biases = {n for n in block_linears(qwen2.model(0)) if n.endswith("bias")}
    base = save_model(qwen2.model(0), tmp_path / "base")
    tunes = {f"e{n}": save_model(perturbed(qwen2, n, names=biases.__contains__), tmp_path / f"e{n}") for n in (1, 2)}
    smile(Group.of(base, tunes), tmp_path / "out", rank=8)
    (result,) = evaluate({"m": tmp_path / "out"}, [Task("e1", [Row("p", "c")])], max_new_tokens=1)
    assert (result.routes.shares, result.routes.accuracy) == ({"base": 1.0}, 0.0)


def test_the_size_is_that_of_the_tensors(out, groups):
    base, _ = paths(groups(TABLE[0], 3))
    results = evaluate({"m": out, "base": base}, [Task("t", [Row("p", "c")])], max_new_tokens=1)
    assert [r.size for r in results] == [sum(t.nbytes for t in tensors(path).values()) for path in (out, base)]


def test_what_cannot_be_scored_is_named(server, tmp_path):
    with pytest.raises(TaskError, match="task t, row 2: nothing to score: no token has another before it"):
        evaluate({"m": "reverse"}, [Task("t", [Row("", "ab"), Row("", "x")], "text")], engine=server.url)
    model = TABLE[0].model(0)
    model.lm_head.weight.data[:] = torch.nan
    save_model(model, tmp_path / "broken")
    with pytest.raises(EngineError, match="task t, row 1: the model's log-likelihood is nan; is it broken"):
        evaluate({"m": tmp_path / "broken"}, [Task("t", [Row("", "ab")], "text")])


def test_a_server_counts_tokens_and_knows_no_size(server):
    tasks = [Task("t", [Row("abc", "cba"), Row("de", "ed")]), Task("u", [Row("uncounted", "c")])]
    results = evaluate({"m": "reverse"}, tasks, engine=server.url)
    assert [(r.generated, r.size, r.routes) for r in results] == [(5, None, None), (None, None, None)]
