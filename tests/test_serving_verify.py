"""Verification with real vLLM: the two engines say the same, whoever is routed to; a wrong expert would be noticed."""

import pytest
import torch

from tests.architectures import TABLE
from tests.routers import copied, give_router, random_router
from tests.vllm_runs import LLM
from upscale import verify
from upscale.config import EvalConfig
from upscale.evaluating.engines import TransformersEngine
from upscale.verifying.engines import TEXTS, TOLERANCES

LLAMA = TABLE[0]


@pytest.fixture(scope="module")
def found(builds, tmp_path_factory):
    """A checkpoint whose router decides by prompt, so that one engine serves every expert; the engines started."""
    out = copied(builds(LLAMA, 3, rank=8)[0], tmp_path_factory.mktemp("verify") / "out")
    give_router(out, random_router(259), granularity="prompt")
    starts, start = [], LLM.__init__

    def counted(llm, *args, **options):
        starts.append(args)
        start(llm, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLM, "__init__", counted)
        return verify(out, engine="vllm"), starts


def test_the_engines_agree_for_the_router_and_for_every_expert(found):
    report, starts = found
    assert report.ok, report.problems
    differences = report["vllm"].figures["differences"]
    assert list(differences) == ["router", "e1", "e2", "e3"] and max(differences.values()) < 1e-5
    assert len(starts) == 1


def test_the_texts_tell_the_experts_apart(builds):
    """By far more than is allowed, or the comparison would be of one model with itself."""
    engine, said = TransformersEngine(str(builds(LLAMA, 3, rank=8)[0]), EvalConfig()), []
    for expert in (None, "base", "e1", "e2", "e3"):
        engine.force(expert)
        said.append(engine.score([("", text) for text in TEXTS], lambda _: None))
    for n, one in enumerate(said):
        for other in said[:n]:
            apart = max(abs(a - b) / tokens for (a, tokens), (b, _) in zip(one, other, strict=True))
            assert apart > 10 * TOLERANCES[torch.float32]
