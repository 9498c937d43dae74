"""`--max-memory`: a build that would take more is refused before it starts; the prediction holds for a real process."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.architectures import SHAPE, Architecture
from tests.cli_runs import assert_one_message, every_file, inline, upscale
from tests.conftest import perturbed, save_model
from upscale.building.build import build, hashing
from upscale.building.methods import smile
from upscale.building.plan import make_plan
from upscale.config import SmileConfig
from upscale.config.option import parse_size
from upscale.errors import ConfigError
from zoo import Group, check

# An embedding of 120 MB in float32, so that what a build holds is told from what libraries take.
TALL = Architecture(
    "tall", lambda: LlamaConfig(**{**SHAPE, "vocab_size": 120_000, "hidden_size": 256, "tie_word_embeddings": True})
)


@pytest.fixture(scope="module")
def group(tmp_path_factory) -> Group:
    root = tmp_path_factory.mktemp("tall")
    base = save_model(TALL.model(seed=0).bfloat16(), root / "base")
    return Group.of(base, {"one": save_model(perturbed(TALL, 1).bfloat16(), root / "one")})


def test_the_prediction_is_within_a_fifth_of_what_a_process_takes(group, tmp_path):
    """The process is a fork, whose peak begins anew."""
    receive, send = os.pipe()
    if not (child := os.fork()):
        try:
            torch.set_num_threads(1)  # those of the other process are not here
            verdict = check(group)
            plan = make_plan(verdict, smile, SmileConfig(rank=8))
            predicted = plan.peak_bytes
            with hashing(group, verdict) as hashes:
                build(plan, group, tmp_path / "out", hashes)
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            os.write(send, json.dumps([predicted, int(status["VmHWM"].split()[0]) * 1024]).encode())
        finally:
            os._exit(0)
    os.close(send)  # so that there is an end to read to if the child fails
    os.waitpid(child, 0)
    predicted, measured = json.loads(os.read(receive, 100))
    assert predicted == pytest.approx(measured, rel=0.2)


def test_what_would_take_more_is_refused_before_work_starts(group, tmp_path):
    for options in ([], ["--energy", "0.5"], ["--dry-run"]):
        result = upscale("smile", tmp_path / "out", *inline(group), "--max-memory", "600MB", *options)
        assert result.exit_code == 1
        assert_one_message(result.output, "--max-memory 600MB is 0.60 GB, and model.embed_tokens alone makes the peak ")
        assert "allow that much" in result.output
    assert not list(tmp_path.iterdir())


def test_the_limit_decides_no_byte(group, tmp_path):
    for name, options in (("one", []), ("two", ["--max-memory", "64 GiB"])):
        assert upscale("smile", tmp_path / name, *inline(group), "--rank", "8", *options).exit_code == 0
    assert every_file(tmp_path / "one") == every_file(tmp_path / "two")


def test_larger_ranks_and_full_svd_take_more(group):
    verdict = check(group)
    least, wider, exact = (
        make_plan(verdict, smile, SmileConfig(**options)).working_bytes["model.embed_tokens"]
        for options in ({"rank": 8}, {"rank": 200}, {"rank": 8, "exact": True})
    )
    assert least < wider and least < exact


def test_sizes_are_read_with_their_units():
    sizes = {"4GiB": 4 << 30, "4 GB": 4 * 10**9, ".5g": 5 * 10**8, "1000000": 10**6, "12 kib": 12288, "7B": 7}
    assert {text: parse_size(text, "--max-memory") for text in sizes} == sizes
    for text in ("", "GB", "-1GB", "0", "4 apples", "1e9", "4GBit", "\u0661GB"):
        with pytest.raises(ConfigError, match=r"--max-memory .*: write a size with its unit, e\.g\. 4GiB"):
            SmileConfig(max_memory=text)
