"""Tasks of every kind, from files; what rows earn; bootstrap intervals against draws and binomials by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch

from upscale import evaluate
from upscale.config import METRICS as CONFIGURED
from upscale.errors import TaskError
from upscale.evaluating.metrics import METRICS, WAYS, interval, mark_generated, mark_ranked, mark_read, metric_of, score
from upscale.evaluating.tasks import Row, Task, load_tasks


def write(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def row(prompt="p", completion="c"):
    return {"prompt": prompt, "completion": completion}


CHOICE = {"prompt": "p", "choices": ["x", "yy"], "answer": 1}


# ---------------------------------------------------------------------------------------------------------------- tasks
def test_tasks_are_read_from_files_and_directories(tmp_path):
    (tmp_path / "more").mkdir()
    one = write(tmp_path / "one.jsonl", row("é\u2028", "1"), "", row("q", "2"), {**row("r", "3"), "extra": 1})
    write(tmp_path / "more/b.jsonl", row())
    write(tmp_path / "more/a.jsonl", row())
    (tmp_path / "more/notes.txt").write_text("no task")
    tasks = load_tasks([one, tmp_path / "more"])
    assert [(task.name, task.kind) for task in tasks] == [(name, "generation") for name in ("one", "a", "b")]
    assert tasks[0].rows == [Row("é\u2028", "1"), Row("q", "2"), Row("r", "3")]
    assert load_tasks([str(one)], limit=2)[0].rows == [Row("é\u2028", "1"), Row("q", "2")]


def test_a_line_separator_within_a_string_ends_no_line(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "one\u2028two"}\r\n{"text": "three"}', encoding="utf-8")
    assert [r.completion for r in load_tasks([tmp_path / "t.jsonl"])[0].rows] == ["one\u2028two", "three"]


def test_the_first_row_decides_the_kind(tmp_path):
    choice = write(tmp_path / "choice.jsonl", CHOICE, {"prompt": "q", "choices": ["1", "0", "2"], "answer": "0"})
    label = write(
        tmp_path / "label.jsonl", *({"prompt": f"p{n}", "label": ["no", "yes", "maybe"][n]} for n in range(3))
    )
    text = write(tmp_path / "text.jsonl", {"text": "é one"}, {"text": "two", "prompt": "ignored"})
    tasks = load_tasks([choice, label, text], limit=2)
    assert [task.kind for task in tasks] == ["choice", "label", "text"]
    assert tasks[0].rows == [Row("p", "yy", ("x", "yy")), Row("q", "0", ("1", "0", "2"))]  # a text wins over an index
    labels = ("maybe", "no", "yes")  # of the whole file, though only two rows are used
    assert tasks[1].rows == [Row("p0", "no", labels), Row("p1", "yes", labels)]
    assert tasks[2].rows == [Row("", "é one"), Row("", "two")]


def test_a_digest_tells_tasks_apart(tmp_path):
    (task,) = load_tasks([write(tmp_path / "t.jsonl", CHOICE, CHOICE)])
    changed = [Row("p", "x", ("x", "yy")), Row("q", "yy", ("x", "yy")), Row("p", "yy", ("y", "yy"))]
    others = [replace(task, name="u"), replace(task, kind="label"), replace(task, rows=task.rows[:1])]
    others += [replace(task, rows=[task.rows[0], other]) for other in changed]
    assert len({task.digest, *(other.digest for other in others)}) == 7
    assert replace(task, rows=tuple(task.rows)).digest == task.digest


GENERATION, LABEL, TEXT = row(), {"prompt": "p", "label": "a"}, {"text": "t"}


def test_tasks_made_in_python_are_checked_too():
    for wrong, says in (
        (lambda: Task("t", []), "task t: no rows"),
        (lambda: Task("t", [Row("p", "c")], "poetry"), "kind 'poetry' is unknown; there are generation, choice, label"),
        (lambda: Task("t", [Row("p", "c", ("a", "b"))], "choice"), "completion is none of its choices"),
        (lambda: evaluate({"m": "x"}, []), "no tasks"),
        (lambda: evaluate({"m": "x"}, [Task("t", [Row("p", "c")])] * 2), "two tasks are named t"),
    ):
        with pytest.raises(TaskError, match=says):
            wrong()


@pytest.mark.parametrize(
    ("first", "line", "says"),
    [
        (GENERATION, "{", 'not a row like {"prompt": "...", "completion": "..."}'),
        (GENERATION, '{"prompt": "p"}', "not a row like"),
        (GENERATION, '["p", "c"]', "not a row like"),
        (GENERATION, "3", "not a row like"),
        (GENERATION, '{"prompt": "p", "completion": 3}', "prompt and completion must be strings"),
        (GENERATION, '{"prompt": null, "completion": "c"}', "prompt and completion must be strings"),
        (GENERATION, CHOICE, 'not a row like {"prompt": "...", "completion": "..."}'),
        (CHOICE, GENERATION, 'not a row like {"prompt": "...", "choices": ["...", "..."], "answer": 0}'),
        (CHOICE, {**CHOICE, "answer": 2}, "answer 2 is neither one of the choices nor an index from 0 to 1"),
        (CHOICE, {**CHOICE, "answer": -1}, "answer -1 is neither"),
        (CHOICE, {**CHOICE, "answer": True}, "answer True is neither"),
        (CHOICE, {**CHOICE, "answer": "z"}, "answer 'z' is neither"),
        (CHOICE, {**CHOICE, "choices": "xy"}, "choices must be a list of strings, none of them empty"),
        (CHOICE, {**CHOICE, "choices": ["x", 1]}, "choices must be a list of strings"),
        (CHOICE, {**CHOICE, "choices": ["x", ""]}, "choices must be a list of strings, none of them empty"),
        (CHOICE, {**CHOICE, "choices": ["x"], "answer": 0}, "choices must be at least two, and differ"),
        (CHOICE, {**CHOICE, "choices": ["x", "x"]}, "choices must be at least two, and differ"),
        (CHOICE, {**CHOICE, "prompt": 1}, "prompt and choices must be strings"),
        (LABEL, {"text": "t", "label": "a"}, 'not a row like {"prompt": "...", "label": "..."}'),
        (LABEL, {"prompt": "p", "label": ""}, "label is empty"),
        (LABEL, {"prompt": "p", "label": 1}, "prompt and label must be strings"),
        (TEXT, LABEL, 'not a row like {"text": "..."}'),
        (TEXT, {"text": ""}, "text is empty"),
        (TEXT, {"text": 1}, "text must be strings"),
    ],
    ids=str,
)
def test_a_bad_line_is_named(tmp_path, first, line, says):
    file = write(tmp_path / "t.jsonl", first, line, first)
    with pytest.raises(TaskError) as error:
        load_tasks([file])
    assert f"{file}:2: {says}" in str(error.value)


def test_a_first_line_of_no_kind_is_told_all_kinds(tmp_path):
    with pytest.raises(TaskError) as error:
        load_tasks([write(tmp_path / "t.jsonl", {"question": "q"})])
    for part in (":1: not a row like", '"completion": "..."', '"choices": ', '"label": "..."', '{"text": "..."}'):
        assert part in str(error.value)


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
    with pytest.raises(TaskError, match=r"one\.jsonl: all rows have the label 'a'"):
        load_tasks([write(tmp_path / "one.jsonl", LABEL, LABEL)])
    twin = write(tmp_path / "none/t.jsonl", row())
    with pytest.raises(TaskError, match="two tasks are named t"):
        load_tasks([twin, write(tmp_path / "t.jsonl", row())])


# -------------------------------------------------------------------------------------------------------------- metrics
def test_the_settings_name_every_metric():
    assert sorted(CONFIGURED) == sorted(metric for way in WAYS for metric in way)
    assert [metric_of(kind, "auto") for kind in METRICS] == ["exact_match", "accuracy", "accuracy", "perplexity"]
    assert [metric_of(kind, "exact_match") for kind in METRICS] == [
        *("exact_match", "accuracy", "exact_match", "perplexity")
    ]


def test_generated_answers():
    pairs = [(" a b\n", "a b"), ("a  b", "a b"), ("A", "a"), ("", ""), ("so: XII.", " XII "), ("xii", "XII"), ("", "a")]
    marks = [mark_generated(Row("p", right), answer) for answer, right in pairs]
    assert [mark["exact_match"] for mark in marks] == [1, 0, 0, 1, 0, 0, 0]
    assert [mark["contains"] for mark in marks] == [1, 0, 0, 1, 1, 0, 0]
    assert [mark["answer"] for mark in marks] == [answer for answer, _ in pairs]


def test_ranked_choices():
    asked = Row("p", "aaaa", ("bb", "aaaa", "c"))
    mark = mark_ranked(asked, [-3.0, -4.0, -2.0])  # by character -1.5, -1, -2
    assert mark == {
        "answer": "c",
        "accuracy": 0.0,
        "accuracy_norm": 1.0,
        "loglikelihood": -4.0,
        "loglikelihoods": [-3.0, -4.0, -2.0],
    }
    assert [mark_ranked(asked, values)["accuracy"] for values in ([-2, -1, -3], [-1, -1, -1])] == [1.0, 0.0]


def test_perplexity_is_of_all_texts_together():
    marks = [mark_read(Row("", "été"), -6.0, 3), mark_read(Row("", "ab"), -1.0, 1)]
    assert [mark["bytes"] for mark in marks] == [5, 2]
    assert score("perplexity", marks) == pytest.approx(math.exp(7 / 4))
    assert score("byte_perplexity", marks) == pytest.approx(math.exp(7 / 7))
    assert score("accuracy", [{"accuracy": 1.0}, {"accuracy": 0.0}, {"accuracy": 0.0}]) == pytest.approx(1 / 3)


# ------------------------------------------------------------------------------------------------------------ intervals
def percentile(values, share):
    """Linear interpolation between the two nearest of the sorted values."""
    values, place = sorted(values), share * (len(values) - 1)
    low = math.floor(place)
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


@pytest.mark.parametrize("metric", ["accuracy", "perplexity", "byte_perplexity"])
def test_an_interval_is_what_resampled_rows_score(metric):
    marks = [
        {"accuracy": float(n % 3 == 0), "loglikelihood": -float(n % 5), "tokens": 1 + n % 4, "bytes": 2 + n % 7}
        for n in range(23)
    ]
    generator = torch.Generator().manual_seed(0)
    scores = []
    for _ in range(1000):
        drawn = [marks[n] for n in torch.randint(23, (23,), generator=generator).tolist()]
        if metric == "accuracy":
            scores.append(sum(mark["accuracy"] for mark in drawn) / 23)
        else:
            below = sum(mark["tokens" if metric == "perplexity" else "bytes"] for mark in drawn)
            scores.append(-sum(mark["loglikelihood"] for mark in drawn) / below)
    low, high = percentile(scores, 0.025), percentile(scores, 0.975)
    want = (low, high) if metric == "accuracy" else (math.exp(low), math.exp(high))
    assert interval(metric, marks) == pytest.approx(want, rel=1e-12)
    assert interval(metric, marks) == interval(metric, marks)
    assert interval(metric, marks, seed=1) != interval(metric, marks)


def test_an_interval_of_shares_is_the_binomial_one():
    """Resampling rows that earn 0 or 1 draws from a binomial distribution, whose tails are known."""
    n, right = 200, 60
    marks = [{"accuracy": float(row < right)} for row in range(n)]
    p = right / n
    below, bounds = 0.0, []
    for hits in range(n + 1):
        below += math.comb(n, hits) * p**hits * (1 - p) ** (n - hits)
        bounds += [hits / n] * (len(bounds) == 0 and below >= 0.025) + [hits / n] * (
            len(bounds) == 1 and below >= 0.975
        )
    assert interval("accuracy", marks) == pytest.approx(bounds, abs=0.0101)  # two rows: 1000 resamples are not endless
    assert interval("accuracy", [{"accuracy": 1.0}] * 5) == (1.0, 1.0)
    assert interval("accuracy", [{"accuracy": 0.0}]) == (0.0, 0.0)
