"""Tasks, metrics and engines: against generation by hand, and a real HTTP server in a thread."""

import json
import threading
from http.server import ThreadingHTTPServer

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from tests.architectures import TABLE
from tests.conftest import perturbed
from tests.reference.models import dense, paths, plain
from tests.reference.server import Handler
from upscale import evaluate, load
from upscale.cli import main
from upscale.config import EvalConfig
from upscale.engines import open_engine
from upscale.errors import ConfigError, EngineError, LoadError, TaskError
from upscale.evaluation import to_json
from upscale.tasks import METRICS, Row, Task, load_tasks

PROMPTS = ["a", "what is 7 in roman numerals?", "sort: pear é fig", "bcd", "x" * 40]


def write(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def row(prompt="p", completion="c"):
    return {"prompt": prompt, "completion": completion}


# ---------------------------------------------------------------------------------------------------------------- tasks
def test_tasks_are_read_from_files_and_directories(tmp_path):
    (tmp_path / "more").mkdir()
    one = write(tmp_path / "one.jsonl", row("é", "1"), "", row("q", "2"), {**row("r", "3"), "extra": 1})
    write(tmp_path / "more/b.jsonl", row())
    write(tmp_path / "more/a.jsonl", row())
    (tmp_path / "more/notes.txt").write_text("no task")
    tasks = load_tasks([one, tmp_path / "more"])
    assert [task.name for task in tasks] == ["one", "a", "b"]
    assert tasks[0].rows == [Row("é", "1"), Row("q", "2"), Row("r", "3")]
    assert load_tasks([str(one)], limit=2)[0].rows == [Row("é", "1"), Row("q", "2")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", ":2: not a row like"),
        ('{"prompt": "p"}', ":2: not a row like"),
        ('["p", "c"]', ":2: not a row like"),
        ("3", ":2: not a row like"),
        ('{"prompt": "p", "completion": 3}', ":2: prompt and completion must be strings"),
        ('{"prompt": null, "completion": "c"}', ":2: prompt and completion must be strings"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    file = write(tmp_path / "t.jsonl", row(), line, row())
    with pytest.raises(TaskError) as error:
        load_tasks([file])
    assert f"{file}{says}" in str(error.value)


def test_files_that_hold_no_tasks_are_named(tmp_path):
    for content in ("", "\n\n"):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(TaskError, match=r"empty\.jsonl: no rows"):
            load_tasks([tmp_path / "empty.jsonl"])
    (tmp_path / "empty.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(TaskError, match=r"empty\.jsonl: cannot be read"):
        load_tasks([tmp_path / "empty.jsonl"])
    with pytest.raises(TaskError, match=r"absent\.jsonl: cannot be read"):
        load_tasks([tmp_path / "absent.jsonl"])
    (tmp_path / "none").mkdir()
    with pytest.raises(TaskError, match=r"none: no \.jsonl file"):
        load_tasks([tmp_path / "none"])
    with pytest.raises(TaskError, match="no tasks"):
        load_tasks([])
    twin = write(tmp_path / "none/t.jsonl", row())
    with pytest.raises(TaskError, match="two tasks are named t"):
        load_tasks([twin, write(tmp_path / "t.jsonl", row())])


def test_metrics():
    exact, contains = METRICS["exact_match"], METRICS["contains"]
    assert [exact(*pair) for pair in ((" a b\n", "a b"), ("a  b", "a b"), ("A", "a"), ("", ""))] == [1, 0, 0, 1]
    assert [contains(*pair) for pair in (("so: XII.", " XII "), ("xii", "XII"), ("", "a"))] == [1, 0, 0]


@pytest.mark.parametrize(
    "options",
    [
        {"limit": 0},
        {"batch_size": 0},
        {"max_new_tokens": 0},
        {"metric": "bleu"},
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
    return builds(TABLE[0], 3, rank=1000, router_rank=4)[0]


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
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


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


# ----------------------------------------------------------------------------------------------------------------- JSON
def test_json_of_the_library_and_of_the_command(server, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write(tasks / "a.jsonl", row("ab", "ba"), row("ab", "ab"))
    write(tasks / "b.jsonl", row("xy", "yx"))
    results = evaluate({"m": "reverse"}, [tasks], engine=server.url)
    wanted = [
        {"model": "m", "task": task, "metric": "exact_match", "score": score, "n": n, "expert": None}
        for task, score, n in (("a", 0.5, 2), ("b", 1.0, 1))
    ]
    file = tmp_path / "scores.json"
    arguments = [
        "eval",
        "m=reverse",
        "--tasks",
        str(tasks / "a.jsonl"),
        str(tasks / "b.jsonl"),
        "--engine",
        server.url,
        "--json",
        str(file),
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    for found in (to_json(results), json.loads(file.read_text())):
        assert list(found) == ["results"]
        for entry, want in zip(found["results"], wanted, strict=True):
            assert entry == {**want, "engine": server.url, "seconds": entry["seconds"]}
            assert 0 <= entry["seconds"] < 60
