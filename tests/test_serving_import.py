"""A FusionBench SMILE checkpoint in vLLM, which cannot load one as it is."""

import torch

import upscale
from tests.reference import fusionbench
from tests.test_upscale_import import BY_NAME, CASES, tokens, tune
from tests.vllm_runs import LENGTHS, assert_parity, generate, prompts, vllm_engine
from upscale.importing.fusionbench import import_fusionbench
from zoo.demo.tokenizer import save_tokenizer


def test_vllm_serves_a_converted_checkpoint(tmp_path):
    """Qwen2: biases, tied heads, two experts a token, a linear without experts, prompts in chunks."""
    architecture = BY_NAME["qwen2"]
    tunes = [tune(architecture, seed) for seed in (1, 2, 3)]
    source = fusionbench.save(architecture.model(seed=0), tunes, tmp_path / "smile", **CASES["top-2"])
    save_tokenizer(source, max_length=256)
    import_fusionbench(source, out := tmp_path / "out", ["math", "chat", "code"])
    model = upscale.load(out)
    with torch.no_grad():
        ours = model(input_ids=tokens()).logits
    torch.testing.assert_close(ours, fusionbench.logits(source, tokens()), atol=1e-4, rtol=0)
    with vllm_engine(out) as llm:
        assert_parity(model, generate(llm, prompts(LENGTHS), prompt_logprobs=1))
