"""What an evaluation makes of its results: retention, baselines, resuming, tables, the page, the command line."""

import json
import os
import re
import tempfile
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from tests.architectures import TABLE
from tests.cli_runs import assert_one_message, group_file, upscale
from tests.reference.models import paths, tensors
from tests.reference.server import reverse_server
from upscale import evaluate, merge
from upscale.config import EvalConfig
from upscale.errors import ConfigError, EngineError, TaskError
from upscale.evaluating.entrants import MERGES, ORACLE
from upscale.evaluating.results import Result, Routes, summarise, to_json
from upscale.evaluating.score_page import to_html
from upscale.evaluating.score_plots import size_plot
from upscale.evaluating.scoreboard import OVERALL_NOTE, SCORES_NOTE, to_markdown
from upscale.evaluating.tasks import Row, Task

PROMPTS = ["a", "what is 7 in roman numerals?", "sort: pear fig", "bcd"]
FAST = {"max_new_tokens": 4}


def result(model="m", task="t", score=0.5, metric="accuracy", **fields):
    values = {
        **{"n": 4, "expert": None, "engine": "transformers", "seconds": 2.0, "low": score / 2, "high": score},
        **{"others": {}, "generated": None, "size": None, "routes": None, "rows": [], "key": f"{model} {task}"},
    }
    return Result(model, task, metric, score, **values | fields)


@pytest.fixture(scope="module")
def out(builds):
    return builds(TABLE[0], 3, rank=16, router_rank=4)[0]


@pytest.fixture(scope="module")
def tasks(groups):
    """Task e1, of which the expert of that name answers all rows right, and e2, of which it answers half."""
    _, experts = paths(groups(TABLE[0], 3))
    made = []
    for name, wrong in (("e1", ""), ("e2", "?")):
        (answered,) = evaluate({"m": experts[name]}, [Task("t", [Row(p, "") for p in PROMPTS])], **FAST)
        answers = [mark["answer"] + wrong * (n % 2) for n, mark in enumerate(answered.rows)]
        made.append(Task(name, [Row(p, a) for p, a in zip(PROMPTS, answers, strict=True)]))
    return made


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with reverse_server() as running:
        yield running


# -------------------------------------------------------------------------------------------------------------- summary
def test_a_model_over_all_tasks():
    routes = [Routes(["a"], {"0": [1.0]}, {"a": share}, share) for share in (0.5, 1.0)]
    results = [
        *(result("base", "a", 0.1, size=100, generated=10), result("base", "b", 0.0, size=100, generated=30)),
        *(result("a", "a", 0.8), result("a", "b", 0.2)),
        *(result("b", "a", 0.3), result("b", "b", 0.5), result("b", "c", 9.0, "perplexity")),
        *(result("up", "a", 0.6, size=150, routes=routes[0]), result("up", "b", 0.25, size=150, routes=routes[1])),
        *(result("part", "b", 0.5, size=150), result("up" + ORACLE, "a", 0.8, expert="a", size=150)),
    ]
    found = {summary.model: summary for summary in summarise(results)}
    assert list(found) == ["base", "a", "b", "up", "part", "up" + ORACLE]
    retained = {name: None if s.retention is None else round(s.retention, 12) for name, s in found.items()}
    # Of a, 0.8 is the own expert's score, of b 0.5; c is a perplexity.
    want = {"base": (0.1 / 0.8 + 0) / 2, "a": (1 + 0.4) / 2, "b": (0.3 / 0.8 + 1) / 2, "up": (0.75 + 0.5) / 2}
    assert retained == {name: round(value, 12) for name, value in want.items()} | {"part": None, "up" + ORACLE: None}
    assert [s.mean for s in found.values()] == [0.05, 0.5, 0.4, 0.425, None, None]
    assert [s.ratio for s in found.values()] == [1.0, None, None, 1.5, 1.5, 1.5]
    assert found["up"].routing == 0.75 and found["base"].routing is None
    assert (found["base"].speed, found["base"].seconds, found["b"].seconds, found["b"].speed) == (10.0, 4.0, 6.0, None)


def test_an_expert_that_scores_nothing_retains_nothing():
    results = [result("a", "a", 0.0), result("m", "a", 0.5), result("b", "b", 0.5, expert="x"), result("m", "b", 0.5)]
    assert [s.retention for s in summarise(results)] == [None, None, None]  # and a forced one is no plain expert
    results = [result("a", "a", 2.0, "perplexity"), result("m", "a", 3.0, "perplexity")]
    assert [(s.mean, s.retention) for s in summarise(results)] == [(None, None)] * 2


# ---------------------------------------------------------------------------------------------------------------- group
def test_a_group_takes_part_with_its_merges(groups, out, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    group = groups(TABLE[0], 3)
    base, _ = paths(group)
    file = group_file(group, tmp_path / "group.yaml")
    results = evaluate({"smile": out, "base": base}, tasks, group=file, oracle=True, **FAST)
    assert list((tmp_path / "scratch").iterdir()) == []  # the merges are gone
    names = ["base", "e1", "e2", "e3", *MERGES, "smile", "smile, right expert forced"]
    assert [(r.model, r.task) for r in results] == [(name, task) for name in names for task in ("e1", "e2")]
    assert [r.expert for r in results if r.model == names[-1]] == ["e1", "e2"]
    scores = {(r.model, r.task): r.score for r in results}
    assert (scores["e1", "e1"], scores["e2", "e2"]) == (1.0, 0.5)
    summary = {s.model: s for s in summarise(results)}
    for name in names:
        assert summary[name].retention == (scores[name, "e1"] / 1.0 + scores[name, "e2"] / 0.5) / 2
    bytes_of_base = sum(t.nbytes for t in tensors(base).values())
    assert [summary[name].size for name in names[:-2]] == [bytes_of_base] * 7
    assert summary["smile"].ratio == sum(t.nbytes for t in tensors(out).values()) / bytes_of_base
    for name, method in MERGES.items():
        merge(group, tmp_path / method, method)
        alone = evaluate({name: tmp_path / method}, tasks, **FAST)
        assert [r.rows for r in alone] == [r.rows for r in results if r.model == name]
    (forced,) = evaluate({"m": out}, tasks[:1], expert="e1", **FAST)
    assert forced.rows == next(r.rows for r in results if r.model == names[-1])


def test_who_cannot_take_part(groups, out, tasks, server):
    group = groups(TABLE[0], 3)
    with pytest.raises(TaskError, match="two models are named e1, one of them in the group"):
        evaluate({"e1": out}, tasks, group=group)
    with pytest.raises(TaskError, match="two models are named TIES"):
        evaluate({"TIES": out}, tasks, group=group)
    with pytest.raises(TaskError, match="--oracle: no task is named like an expert"):
        evaluate({"m": out}, [Task("poetry", tasks[0].rows)], oracle=True)
    for options in ({"group": group}, {"oracle": True}):
        with pytest.raises(EngineError, match="--group and --oracle need an engine that loads models"):
            evaluate({"m": "reverse"}, tasks, engine=server.url, **options)


def test_the_oracle_leaves_out_tasks_of_no_expert(out, tasks):
    results = evaluate({"m": out}, [*tasks, Task("poetry", tasks[0].rows)], oracle=True, **FAST)
    assert [(r.model, r.task, r.expert) for r in results] == [
        *(("m", "e1", None), ("m", "e2", None), ("m", "poetry", None)),
        *(("m" + ORACLE, "e1", "e1"), ("m" + ORACLE, "e2", "e2")),
    ]


# ------------------------------------------------------------------------------------------------------------- resuming
class Stop(Exception):
    pass


def stop_at(what):
    def progress(done, total, doing):
        if doing == what:
            raise Stop

    return progress


@pytest.fixture
def opened(monkeypatch):
    """The models that engines were opened for."""
    from upscale.evaluating import evaluation

    models, real = [], evaluation.open_engine
    monkeypatch.setattr(evaluation, "open_engine", lambda model, config: models.append(model) or real(model, config))
    return models


def test_an_interrupted_run_goes_on_where_it_stopped(groups, out, tasks, tmp_path, opened):
    file, models = tmp_path / "scores.json", {"e1": paths(groups(TABLE[0], 3))[1]["e1"], "m": out}
    with pytest.raises(Stop):
        evaluate(models, tasks, file=file, progress=stop_at("m on e2"), **FAST)
    kept = json.loads(file.read_text())
    assert [(r["model"], r["task"]) for r in kept["results"]] == [("e1", "e1"), ("e1", "e2"), ("m", "e1")]
    opened.clear()
    seen = []
    results = evaluate(models, tasks, file=file, progress=lambda *step: seen.append(step), **FAST)
    assert opened == [str(out)]
    assert seen == [(12, 16, "loading m"), (16, 16, "m on e2")]
    assert json.loads(json.dumps(to_json(results)))["results"][:3] == kept["results"]  # to the second
    assert json.loads(file.read_text()) == json.loads(json.dumps({"version": 1, **to_json(results), "earlier": []}))
    assert evaluate(models, tasks, file=file, **FAST) == results
    assert opened == [str(out)]
    renamed = evaluate({"new name": out}, tasks, file=file, **FAST)
    assert [(r.model, r.rows) for r in renamed] == [("new name", r.rows) for r in results[2:]]
    assert opened == [str(out)]
    assert not [path for path in tmp_path.iterdir() if path != file]


def test_nothing_is_lost_that_another_run_found(out, groups, tasks, tmp_path, opened):
    file, base = tmp_path / "scores.json", paths(groups(TABLE[0], 3))[0]
    first = evaluate({"m": out}, tasks, file=file, **FAST)
    evaluate({"base": base}, tasks[:1], file=file, **FAST)
    content = json.loads(file.read_text())
    assert [(r["model"], r["task"]) for r in content["results"]] == [("base", "e1")]
    assert [(r["model"], r["task"]) for r in content["earlier"]] == [("m", "e1"), ("m", "e2")]
    opened.clear()
    assert evaluate({"m": out}, tasks, file=file, **FAST) == first
    assert opened == []


def test_what_has_changed_is_computed_again(groups, tasks, tmp_path, opened):
    base = paths(groups(TABLE[0], 3))[0]
    model, file = tmp_path / "model", tmp_path / "scores.json"
    model.mkdir()
    for path in base.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    ranked = Task("r", [Row(p, "x", ("x", "y")) for p in PROMPTS], "choice")

    def runs(these=tasks, **options):
        opened.clear()
        evaluate({"m": model}, these, file=file, **FAST | options)
        return len(opened)

    assert (runs(), runs()) == (1, 0)
    assert runs(batch_size=2) == runs(device="cpu") == 0  # these decide nothing
    for options in ({"max_new_tokens": 3}, {"prompt_template": "{prompt}\\n"}, {"chat": True}, {"metric": "contains"}):
        assert (runs(**options), runs(**options)) == (1, 0)
    assert (runs(limit=2), runs(limit=2)) == (1, 0)
    assert (runs([ranked]), runs([ranked], max_new_tokens=3)) == (1, 0)  # nothing is generated
    assert runs([Task("r", [*ranked.rows[:3], Row("a", "y", ("x", "y"))], "choice")]) == 1
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (runs(), runs()) == (1, 0)
        os.utime(model / name, (1, 1))
    (model / "README.md").write_text("a card decides nothing")
    assert (runs(), runs()) == (1, 0)


def test_a_file_that_holds_something_else_is_left_alone(out, tasks, tmp_path):
    file = tmp_path / "scores.json"
    for content in ("", "[]", '{"results": []}', '{"version": 0, "results": [], "earlier": []}', '{"a": 1}'):
        file.write_text(content)
        with pytest.raises(TaskError, match=r"scores\.json: exists and holds no results to go on from"):
            evaluate({"m": out}, tasks, file=file)
        assert file.read_text() == content
    for path in (tmp_path, tmp_path / "no/such.json"):
        with pytest.raises(TaskError, match="no file can be written there"):
            evaluate({"m": out}, tasks, file=path)


def test_results_come_back_from_json():
    routes = Routes(["a"], {"0": [0.5]}, {"a": 1.0}, 1.0)
    for one in (result(), result(routes=routes, rows=[{"answer": "é", "accuracy": 1.0}], generated=3)):
        (entry,) = json.loads(json.dumps(to_json([one])))["results"]
        assert Result.from_json(entry) == one
    assert "rows" not in to_json([result()], rows=False)["results"][0]


# ------------------------------------------------------------------------------------------------- tables and the page
SHOWN = [
    *(
        result("base", "a|b", 0.25, size=2_000_000, generated=50),
        result("base", "p", 12.5, "perplexity", size=2_000_000),
    ),
    *(result("<up>", "a|b", 1.0, size=3_000_000), result("<up>", "p", 7.25, "perplexity", size=3_000_000)),
]


def test_markdown():
    scores, overall = to_markdown(SHOWN).split("### ")[1:]
    assert scores.splitlines()[:6] == [
        "Scores",
        "",
        r"| model | a\|b<br>accuracy<br>n=4 | p<br>perplexity<br>n=4 |",
        "| --- | ---: | ---: |",
        "| base | 0.250<br>.12-.25 | 12.50<br>6.25 to 12.50 |",
        "| <up> | 1.000<br>.50-1.00 | 7.25<br>3.62 to 7.25 |",
    ]
    assert overall.splitlines()[:6] == [
        "Overall",
        "",
        "| model | mean | MB | of base | seconds | tokens/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| base | 0.250 | 2.0 | 1.00 | 4.0 | 25 |",
        "| <up> | 1.000 | 3.0 | 1.50 | 4.0 |  |",
    ]
    assert scores.rstrip().endswith(SCORES_NOTE) and overall.rstrip().endswith(OVERALL_NOTE)


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_and_fetches_nothing():
    routes = Routes(["e1", "e2"], {"model.layers.0": [0.2, 0.8], "lm_head": [1.0, 0.0]}, {"e2": 1.0}, None)
    routed = [result("base", "routed", 0.0, size=2_000_000), result("<up>", "routed", size=3_000_000, routes=routes)]
    page = to_html([*SHOWN, *routed], EvalConfig(chat=True))
    parsed = Page(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    for name, value in parsed.attributes:
        if name.split(":")[-1] in ("href", "src", "data", "action"):
            assert value.startswith(("#", "data:image/png;base64,")), (name, value)
    assert "@import" not in page and not re.search(r"url\((?!#)", page) and "DOCTYPE svg" not in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 3
    texts = [
        ["".join(t.itertext()) for t in ElementTree.fromstring(d).iter("{http://www.w3.org/2000/svg}text")]
        for d in drawings
    ]
    scores, sizes, routing = texts
    assert {"base", "<up>", "a|b", "p", "perplexity", "routed"} <= set(scores)
    assert {"base", "mean score", "size of the tensors, MB"} <= set(sizes)
    assert {"routed", "e1", "e2", "0", "lm_head", "mean weight"} <= set(routing)
    for text in ("<up>", "1.000", ".50-1.00", "12.50", '"chat": true', SCORES_NOTE):
        assert any(text in part for part in parsed.texts), text
    assert "<up>" not in page
    assert to_html(SHOWN, EvalConfig()) == to_html(SHOWN, EvalConfig())


def test_quality_against_size_wants_two_models_with_both():
    assert size_plot(SHOWN) is not None
    assert size_plot(SHOWN[:2]) is None
    assert size_plot([result("a", size=1), result("b")]) is None


def test_without_matplotlib_the_remedy_is_named(monkeypatch, out, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"--html needs matplotlib: pip install 'upscale-zoo\[plot\]'"):
        to_html(SHOWN, EvalConfig())
    (tmp_path / "t.jsonl").write_text('{"prompt": "p", "completion": "c"}')
    done = upscale("eval", out, "--tasks", tmp_path / "t.jsonl", "--html", tmp_path / "page.html")
    assert done.exit_code == 1
    assert_one_message(done.output, "--html needs matplotlib")
    assert not (tmp_path / "page.html").exists()


# --------------------------------------------------------------------------------------------------------- command line
def test_the_command_writes_what_the_library_finds(groups, out, tasks, tmp_path):
    (tmp_path / "tasks").mkdir()
    for task in tasks:
        lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in task.rows]
        (tmp_path / f"tasks/{task.name}.jsonl").write_text("\n".join(lines))
    group = group_file(groups(TABLE[0], 3), tmp_path / "group.yaml")
    files = {name: tmp_path / f"scores.{name}" for name in ("json", "markdown", "html")}
    arguments = ["eval", f"smile={out}", "--group", group, "--oracle", "--tasks", tmp_path / "tasks"]
    arguments += ["--max-new-tokens", "4"] + [part for name, file in files.items() for part in (f"--{name}", file)]
    done = upscale(*arguments)
    assert done.exit_code == 0, done.output
    results = evaluate({"smile": out}, tasks, group=group, oracle=True, **FAST)
    content = json.loads(files["json"].read_text())
    assert list(content) == ["version", "results", "models", "earlier"]
    found = [Result.from_json(entry) for entry in content["results"]]
    assert [(r.model, r.task, r.score, r.rows) for r in found] == [(r.model, r.task, r.score, r.rows) for r in results]
    assert [entry["retention"] for entry in content["models"]] == [s.retention for s in summarise(results)]
    assert files["markdown"].read_text() == to_markdown(found)
    assert files["html"].read_text() == to_html(found, EvalConfig(oracle=True, **FAST))
    for text in ("Scores: exact_match, transformers", "task arithmetic", "TIES", "retention", "1.00-1.00"):
        assert text in done.output
    again = upscale(*arguments)
    assert again.output == done.output and files["json"].read_text() == json.dumps(content, indent=1) + "\n"


@pytest.mark.parametrize("flag", ["--json", "--markdown", "--html"])
def test_a_file_that_cannot_be_written_is_named_first(out, tasks, tmp_path, flag):
    (tmp_path / "t.jsonl").write_text('{"prompt": "p", "completion": "c"}')
    done = upscale("eval", out, "--tasks", tmp_path / "t.jsonl", flag, tmp_path / "no/such/file")
    assert done.exit_code == 1
    assert_one_message(done.output, f"{flag} {tmp_path}/no/such/file: no file can be written there")


def test_the_command_on_a_server(server, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "ab", "completion": "ba"}\n{"prompt": "ab", "completion": "ab"}')
    (tmp_path / "b.jsonl").write_text('{"prompt": "ab", "choices": ["c", "d"], "answer": 0}')
    done = upscale("eval", "m=reverse", "--tasks", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--engine", server.url)
    assert done.exit_code == 0, done.output
    for text in ("Scores, http://127.0.0.1", "exact_match", "accuracy", "n=2", "n=1", "0.500", ".00-1.00"):
        assert text in done.output
    assert_one_message(upscale("eval", "--tasks", tmp_path / "a.jsonl").output, "no model to evaluate")
