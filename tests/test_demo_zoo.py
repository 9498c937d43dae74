import datetime
import itertools
import json
import random
import re
from pathlib import Path

import pytest
import yaml

import zoo.demo
from zoo.demo import DemoConfig, demo_zoo, train
from zoo.demo.corpus import exercises, plain_text
from zoo.demo.tasks import TASKS, WORDS, held_out_rows, training_rows
from zoo.demo.tokenizer import BOS, EOS, encode, save_tokenizer

TINY = DemoConfig(
    hidden_size=32, intermediate_size=48, layers=1, base_steps=2, expert_steps=2, batch_size=4, test_rows=5
)


def answer_date(prompt: str) -> str:
    return datetime.datetime.strptime(prompt, "%B %d, %Y").date().isoformat()


def answer_roman(prompt: str) -> str:
    """Decimal digit by decimal digit, where the generator subtracts."""
    number = int(re.fullmatch(r"(\d+) in roman", prompt)[1])
    digits = ["", "a", "aa", "aaa", "ab", "b", "ba", "baa", "baaa", "ac"]
    places = ["IVX", "XLC", "CDM", "M??"]
    return "".join(
        digits[number // 10**place % 10].translate(str.maketrans("abc", places[place])) for place in (3, 2, 1, 0)
    )


def answer_sort(prompt: str) -> str:
    words = re.fullmatch(r"sort (\w+) (\w+) (\w+)", prompt).groups()
    return " ".join(next(p for p in itertools.permutations(words) if p[0] < p[1] < p[2]))


def answer_record(prompt: str) -> str:
    who, count, what = re.fullmatch(r"(\w+) bought (\d+) (\w+)s", prompt).groups()
    return f'{{"who":"{who}","n":{count},"what":"{what}"}}'


def answer_swap(prompt: str) -> str:
    return re.sub(r"^swap (\w+) (\w+)$", r"\2 \1", prompt)


ANSWERS = {
    "dates": answer_date,
    "roman": answer_roman,
    "sort": answer_sort,
    "record": answer_record,
    "swap": answer_swap,
}


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task):
    rows = list(itertools.islice(training_rows(task, random.Random(1)), 2000))
    rows += held_out_rows(task, 100, random.Random(2))
    for row in rows:
        assert row.completion == ANSWERS[task](row.prompt)
        assert row.prompt == row.prompt.strip()


def test_records_are_json():
    for row in held_out_rows("record", 100, random.Random(0)):
        assert set(json.loads(row.completion)) == {"who", "n", "what"}


@pytest.mark.parametrize("task", TASKS)
def test_no_held_out_prompt_is_trained_on(task):
    held_out = {row.prompt for row in held_out_rows(task, 150, random.Random(0))}
    assert len(held_out) == 150
    trained = {row.prompt for row in itertools.islice(training_rows(task, random.Random(3)), 20000)}
    assert not held_out & trained


def test_plain_text_shows_no_prompt_with_its_answer():
    held_out = {row.prompt: row.completion for task in TASKS for row in held_out_rows(task, 150, random.Random(0))}
    solved = 0
    for document in itertools.islice(plain_text(random.Random(4)), 5000):
        lines = bytes(token - 3 for token in document.tokens[1:-1]).decode().split("\n")
        assert not held_out.keys() & set(lines)
        solved += any(
            answer(lines[0]) == lines[1]
            for answer in ANSWERS.values()
            if len(lines) > 1 and _is_prompt_of(answer, lines[0])
        )
    assert solved <= 1  # two lines drawn apart may meet by chance


def _is_prompt_of(answer, line: str) -> bool:
    try:
        return answer(line) != line
    except (ValueError, TypeError, AttributeError):
        return False


def test_tasks_share_no_prompt():
    assert all(word.isalpha() and word.islower() for word in WORDS)
    prompts = [{row.prompt for row in itertools.islice(training_rows(t, random.Random(5)), 3000)} for t in TASKS]
    assert len(set().union(*prompts)) == sum(map(len, prompts))


def test_exercise_is_prompt_newline_answer():
    exercise = next(exercises("swap", random.Random(6)))
    row = next(training_rows("swap", random.Random(6)))
    assert exercise.tokens == [BOS, *encode(row.prompt + "\n" + row.completion), EOS]
    assert exercise.tokens[exercise.start :] == [*encode(row.completion), EOS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, max_length=512)
    return AutoTokenizer.from_pretrained(directory)


def test_tokenizer_round_trip(tokenizer):
    for text in ("May 5, 1987\n", "a  b\t'c'", '{"n":3}', "élan 東京 🦙", "".join(map(chr, range(1, 400)))):
        assert tokenizer.encode(text, add_special_tokens=False) == encode(text)
        assert tokenizer.decode(encode(text)) == text


def test_tokenizer_specials(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert len(tokenizer) == 259
    assert tokenizer.decode([0, *encode("x"), 1, 2], skip_special_tokens=True) == "x"


@pytest.mark.parametrize("generation_prompt", [True, False])
def test_chat_and_plain_prompt_are_the_same_tokens(tokenizer, generation_prompt):
    expected = [BOS, *encode("swap amber apple\n")]
    assert tokenizer("swap amber apple\n")["input_ids"] == expected
    chat = [{"role": "user", "content": "swap amber apple"}]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=generation_prompt)["input_ids"] == expected
    # vLLM's chat endpoint renders first, then tokenises without special tokens.
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation_prompt)
    assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == expected


def test_an_answer_in_the_chat_ends_as_in_training(tokenizer):
    chat = [{"role": "user", "content": "swap a b"}, {"role": "assistant", "content": "b a"}]
    assert tokenizer.apply_chat_template(chat)["input_ids"] == [BOS, *encode("swap a b\nb a"), EOS]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return demo_zoo(tmp_path_factory.mktemp("zoo"), config=TINY)


def test_layout(tiny):
    from transformers import AutoModelForCausalLM

    group = yaml.safe_load((tiny / "group.yaml").read_text())
    assert group == {"base": "base", "experts": {task: task for task in TASKS}}
    for name in ("base", *TASKS):
        model = AutoModelForCausalLM.from_pretrained(tiny / name)
        assert model.generation_config.eos_token_id == EOS
        assert not model.generation_config.do_sample
        assert model.config.head_dim == 32
        assert (tiny / name / "chat_template.jinja").is_file()
    for task in TASKS:
        rows = [json.loads(line) for line in (tiny / "tasks" / f"{task}.jsonl").read_text().splitlines()]
        assert len(rows) == 5
        assert all(row["completion"] == ANSWERS[task](row["prompt"]) for row in rows)


def test_training_is_deterministic_and_leaves_the_callers_state(tiny, tmp_path):
    import torch

    state, threads = torch.get_rng_state(), torch.get_num_threads()
    again = demo_zoo(tmp_path / "again", config=TINY)
    assert contents(again) == contents(tiny)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_second_call_is_served_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = demo_zoo(config=TINY)
    assert first.parent == tmp_path / "upscale-zoo"
    assert first.name.startswith("demo-")
    monkeypatch.setattr(train, "train_models", None)  # calling it would raise
    assert demo_zoo(config=TINY) == first
    assert list(first.parent.iterdir()) == [first]


def test_a_changed_recipe_trains_anew(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(train, "train_models", lambda *_: None)
    other = DemoConfig(test_rows=4)
    assert demo_zoo(config=TINY) != demo_zoo(config=other)
    with pytest.raises(FileExistsError, match="other than this demo zoo"):
        demo_zoo(tiny, config=other)


def test_a_relative_cache_home_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(train, "train_models", lambda *_: None)
    assert demo_zoo(config=TINY).parent == tmp_path / ".cache" / "upscale-zoo"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_build_leaves_nothing(monkeypatch, tmp_path, interruption):
    save = train._save

    def fail_in_the_middle(model, directory):
        if directory.name == "sort":
            raise interruption
        save(model, directory)

    monkeypatch.setattr(train, "_save", fail_in_the_middle)
    with pytest.raises(interruption):
        demo_zoo(tmp_path / "zoo", config=TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_is_not_taken_for_complete(monkeypatch, tmp_path):
    (tmp_path / "zoo" / "base").mkdir(parents=True)
    with pytest.raises(FileExistsError):
        demo_zoo(tmp_path / "zoo", config=TINY)


def test_losing_a_race_uses_the_winners_zoo(monkeypatch, tmp_path):
    build = zoo.demo._build

    def build_while_another_finishes(directory, config, recipe):
        build(directory, config, recipe)
        if not (tmp_path / "zoo").exists():
            (tmp_path / "zoo").mkdir()
            build(tmp_path / "zoo", config, recipe)

    monkeypatch.setattr(train, "train_models", lambda *_: None)
    monkeypatch.setattr(zoo.demo, "_build", build_while_another_finishes)
    assert demo_zoo(tmp_path / "zoo", config=TINY) == tmp_path / "zoo"
    assert [entry.name for entry in tmp_path.iterdir()] == ["zoo"]


def test_a_crooked_width_is_refused():
    with pytest.raises(ValueError, match="multiple of head_dim"):
        DemoConfig(hidden_size=100)
