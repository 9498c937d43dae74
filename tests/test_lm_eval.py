"""lm-eval's backends, `hf` on an upscaled checkpoint and `local-completions` on its endpoint, against our results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import upscale
from serving.running import running_server
from tests.architectures import TABLE
from tests.conftest import perturbed, save_model
from upscale.config import EvalConfig
from upscale.evaluating.engines import open_engine
from upscale.evaluating.tasks import Row, Task
from zoo import Group

LLAMA = next(architecture for architecture in TABLE if architecture.name == "llama")
TOKENS = 8
QUESTIONS = [f"Q: what is {n} + {n * n}?{' Think.' * (n % 3)}\nA:" for n in range(6)]
CHOICES = [(" yes", " no, never", f" {n} times") for n in range(6)]
RANK = """
task: rank
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITE = """
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs: {{until: ["\\n\\n\\n"], max_gen_toks: {tokens}, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
# A process of its own, in which nothing imports this package: the checkpoint loads by the code that it carries.
SCRIPT = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

for line in sys.stdin:
    backend, arguments = json.loads(line)
    found = lm_eval.simple_evaluate(
        model=backend, model_args=arguments, tasks=["rank", "write"], log_samples=True, bootstrap_iters=0, batch_size=4,
        device="cpu", task_manager=TaskManager(include_path=sys.argv[1], include_defaults=False),
    )
    answers = {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in found["samples"].items()
    }
    assert "upscale" not in sys.modules
    print("RESULT", json.dumps({"backend": backend, "scores": found["results"], "answers": answers}), flush=True)
"""


def plain_ascii(model):
    """Never choose a byte that is no printable character: engines differ in how they show half a character."""
    model.lm_head.weight.data[[token for token in range(259) if not 35 <= token < 130]] = 0
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("lm-eval")
    base = save_model(plain_ascii(LLAMA.model(seed=0)), root / "base")
    tunes = {f"e{n}": save_model(plain_ascii(perturbed(LLAMA, n)), root / f"e{n}") for n in (1, 2, 3)}
    upscale.smile(Group.of(base, tunes), root / "smile", rank=8, router_rank=4, top_k=2)
    return root / "smile"


@pytest.fixture(scope="module")
def tasks(checkpoint):
    """Questions with choices, and questions of which every second is answered as our engine answers it."""
    answers = open_engine(str(checkpoint), EvalConfig(max_new_tokens=TOKENS)).answer(QUESTIONS, lambda _: None)
    written = [answer.strip() if n % 2 else "no such answer" for n, answer in enumerate(answers)]
    rank = [Row(q, c[n % 3], c) for n, (q, c) in enumerate(zip(QUESTIONS, CHOICES, strict=True))]
    return [Task("rank", rank, "choice"), Task("write", [Row(*pair) for pair in zip(QUESTIONS, written, strict=True)])]


@pytest.fixture(scope="module")
def theirs(checkpoint, tasks, tmp_path_factory):
    """lm-eval's results by backend. It starts, and runs the checkpoint itself, while the server starts."""
    folder = tmp_path_factory.mktemp("tasks")
    with (folder / "docs.jsonl").open("w") as docs:
        for n, (ranked, written) in enumerate(zip(tasks[0].rows, tasks[1].rows, strict=True)):
            doc = {"prompt": ranked.prompt, "choices": ranked.choices, "answer": n % 3, "written": written.completion}
            print(json.dumps(doc), file=docs)
    for name, text in (("rank", RANK), ("write", WRITE)):
        (folder / f"{name}.yaml").write_text(text.format(docs=folder / "docs.jsonl", tokens=TOKENS))
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "127.0.0.1", "PATH": "/usr/bin:/bin"}
    environment |= {"HOME": str(folder), "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment, "cwd": folder}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log, **pipes) as lm_eval:
        itself = {"pretrained": str(checkpoint), "dtype": "float32", "trust_remote_code": True}
        print(json.dumps(["hf", itself]), file=lm_eval.stdin, flush=True)
        with running_server(checkpoint, ["--max-num-seqs", "16"], folder / "server.log") as url:
            served = {"model": "smile", "tokenizer": str(checkpoint), "base_url": f"{url}/v1/completions"}
            # lm-eval leaves out the token at the start, or the server adds a second one, unless both are set.
            served |= {"num_concurrent": 4, "max_length": 256, "tokenized_requests": True, "add_bos_token": True}
            output, _ = lm_eval.communicate(json.dumps(["local-completions", served]))
    assert lm_eval.returncode == 0, (folder / "log").read_text()[-3000:]
    found = [json.loads(line.removeprefix("RESULT ")) for line in output.splitlines() if line.startswith("RESULT ")]
    return {result["backend"]: result for result in found}


@pytest.mark.parametrize("backend", ["hf", "local-completions"])
def test_lm_eval_finds_what_we_find(backend, checkpoint, tasks, theirs):
    rank, write = upscale.evaluate({"m": checkpoint}, tasks, max_new_tokens=TOKENS)
    found = theirs[backend]
    for row, answers in zip(rank.rows, found["answers"]["rank"], strict=True):
        assert [float(value) for value, _ in answers] == pytest.approx(row["loglikelihoods"], abs=1e-3)
    assert [answer for (answer,) in found["answers"]["write"]] == [row["answer"] for row in write.rows]
    scores = found["scores"]
    assert scores["rank"]["acc,none"] == rank.score
    assert scores["rank"]["acc_norm,none"] == rank.others["accuracy_norm"]
    assert scores["write"]["exact_match,none"] == write.score == 0.5
