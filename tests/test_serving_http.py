"""The OpenAI-compatible endpoint: real vLLM, real HTTP, the official client."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer

import upscale
from serving.running import running_server
from tests.architectures import TABLE
from tests.conftest import perturbed, save_model
from upscale.calibrating.calibration import calibrate
from upscale.config import EvalConfig
from upscale.evaluating.engines import TransformersEngine
from upscale.evaluating.tasks import Row, Task
from zoo import Group

LLAMA = next(architecture for architecture in TABLE if architecture.name == "llama")
WORDS = {"e1": "word ", "e2": "12 ", "e3": "(+) ", "base": "Q?! "}  # of each expert's prompts
PROMPTS = [f"{list(WORDS.values())[n % 4] * (3 + n // 4 % 9)}{n}" for n in range(40)]
TOKENS = 12


def answers_in_ascii(model):
    """Never choose a byte that is no printable character: engines differ in how they show half a character."""
    model.lm_head.weight.data[[token for token in range(259) if not 35 <= token < 130]] = 0
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("served")
    base = save_model(answers_in_ascii(LLAMA.model(seed=0)), root / "base")
    tunes = {f"e{n}": save_model(answers_in_ascii(perturbed(LLAMA, n)), root / f"e{n}") for n in (1, 2, 3)}
    upscale.smile(Group.of(base, tunes), root / "smile", rank=8)
    calibrate(root / "smile", {name: [word * n for n in (2, 3, 5, 8)] for name, word in WORDS.items()})
    return root / "smile"


@pytest.fixture(scope="module")
def server(checkpoint):
    with running_server(checkpoint, ["--max-num-seqs", "16"], checkpoint.with_name("server.log")) as url:
        yield url


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def in_transformers(checkpoint, prompts, chat=False, expert=None):
    config = EvalConfig(chat=chat, max_new_tokens=TOKENS)
    engine = TransformersEngine(str(checkpoint), config)
    engine.force(expert)
    return engine.answer(prompts, lambda _: None)


def test_the_model_is_served_under_its_directory_name(client):
    assert [model.id for model in client.models.list()] == ["smile"]


def test_two_hundred_concurrent_requests_answer_as_transformers_does(client, checkpoint):
    """Each is routed by its prompt, or goes to the expert that it asks for; all share batches."""
    asked = (None, None, *WORDS)
    expected = {expert: in_transformers(checkpoint, PROMPTS, expert=expert) for expert in dict.fromkeys(asked)}
    assert expected[None] == [expected[list(WORDS)[n % 4]][n] for n in range(len(PROMPTS))]  # routed as calibrated
    assert len({tuple(answers) for answers in expected.values()}) == 5

    def ask(number):
        prompt, expert = PROMPTS[number % len(PROMPTS)], asked[number % len(asked)]
        extra = {"vllm_xargs": {"expert": expert}} if expert else None
        reply = client.completions.create(
            model="smile", prompt=prompt, max_tokens=TOKENS, temperature=0, extra_body=extra
        )
        return reply.choices[0].text

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(200)))
    assert answers == [expected[asked[n % len(asked)]][n % len(PROMPTS)] for n in range(200)]


@pytest.mark.parametrize(
    ("expert", "message"),
    [("poetry", "no expert poetry in this model; it has e1, e2, e3 and base"), (["e1"], "expert must be one name")],
)
def test_a_request_for_an_unknown_expert_is_refused(client, expert, message):
    body = {"model": "smile", "extra_body": {"vllm_xargs": {"expert": expert}}}
    messages = [{"role": "user", "content": "1"}]
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.completions.create(prompt="1", **body)
    assert "\n" not in refused.value.body["message"]
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(messages=messages, **body)
    with pytest.raises(openai.APIError, match=message):  # a stream has begun when vLLM looks at a request
        list(client.chat.completions.create(messages=messages, stream=True, **body))


def test_chat_streams_what_transformers_answers(client, checkpoint):
    (expected,) = in_transformers(checkpoint, ["tell me"], chat=True)
    stream = client.chat.completions.create(
        model="smile",
        messages=[{"role": "user", "content": "tell me"}],
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == expected


def test_eval_scores_the_same_in_every_engine(server, checkpoint):
    answers = in_transformers(checkpoint, PROMPTS[:8])
    wrong = [answer if n % 2 else "no such answer" for n, answer in enumerate(answers)]
    tasks = [
        Task("echo", [Row(p, c) for p, c in zip(PROMPTS, wrong, strict=False)]),
        Task("rank", [Row(p, " no", (" yes", " no", " été")) for p in PROMPTS[:8]], "choice"),
        Task("read", [Row("", p * n) for n, p in enumerate(PROMPTS[7:11], start=1)], "text"),
    ]
    found = {}
    for engine, model in (("transformers", checkpoint), ("vllm", checkpoint), (server, "smile")):
        found[engine] = upscale.evaluate({"m": model}, tasks, engine=engine, max_new_tokens=TOKENS)
    (echo, rank, read), *others = found.values()
    assert echo.score == 0.5
    for result in others:
        assert [r.score for r in result[:2]] == [0.5, rank.score]
        assert result[0].generated == echo.generated
        for got, want in zip(result[1].rows, rank.rows, strict=True):
            assert got["loglikelihoods"] == pytest.approx(want["loglikelihoods"], abs=1e-3)
        assert [row["tokens"] for row in result[2].rows] == [row["tokens"] for row in read.rows]
        assert result[2].score == pytest.approx(read.score, rel=1e-4)


def test_plain_vllm_finds_the_plugin_and_forces_an_expert(checkpoint, tmp_path):
    """The plugin is found without our command; an expert is forced by vLLM's own flag."""
    expected = in_transformers(checkpoint, PROMPTS[:4], expert="e2")
    script = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    path, prompts, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    forced = {"upscale": {"expert": "e2"}}
    llm = LLM(path, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=1 << 30, additional_config=forced)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens), use_tqdm=False)
    json.dump([o.outputs[0].text for o in outputs], open(sys.argv[4], "w"))
"""
    (tmp_path / "run.py").write_text(script)
    answers = tmp_path / "answers.json"
    arguments = [str(checkpoint), json.dumps(PROMPTS[:4]), str(TOKENS), str(answers)]
    subprocess.run([sys.executable, str(tmp_path / "run.py"), *arguments], check=True, cwd=tmp_path, timeout=240)
    assert json.loads(answers.read_text()) == expected


def test_without_the_plugin_vllm_refuses(checkpoint, tmp_path):
    script = f"from vllm import LLM; LLM({str(checkpoint)!r}, enforce_eager=True)"
    environment = {"VLLM_PLUGINS": "none", "PATH": "", "HOME": str(tmp_path), "VLLM_CPU_KVCACHE_SPACE": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0
    assert "trust_remote_code=True" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-directory/x/y"], "no such directory, and not a Hub id"),
        (["{checkpoint}", "--expert", "poetry"], "no expert poetry in this model; it has e1, e2, e3 and base"),
        (["{empty}"], "not a model directory"),
    ],
)
def test_serve_refuses_bad_input_with_one_line(arguments, message, checkpoint, tmp_path):
    filled = [argument.format(checkpoint=checkpoint, empty=tmp_path) for argument in arguments]
    run = subprocess.run([sys.executable, "-m", "upscale.cli", "serve", *filled], capture_output=True, text=True)
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr


def test_serve_says_that_vllm_is_missing(checkpoint):
    script = "import sys; sys.modules['vllm'] = None; from upscale.cli import main; main(['serve', sys.argv[1]])"
    run = subprocess.run([sys.executable, "-c", script, str(checkpoint)], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.strip().endswith("pip install 'upscale-zoo[gpu]' (CUDA) or 'upscale-zoo[cpu]'")


def test_the_tokenizer_loads_without_asking(checkpoint):
    script = """
import sys, upscale.loading
from transformers import AutoTokenizer
print(len(AutoTokenizer.from_pretrained(sys.argv[1])))
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(checkpoint)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert run.stdout.strip() == str(len(AutoTokenizer.from_pretrained(checkpoint)))
    assert "trust_remote_code" not in run.stderr
