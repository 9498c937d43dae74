"""Experts taken out as LoRA adapters, in vLLM's own multi-LoRA over the plain base, against PEFT."""

from peft import PeftModel
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

import upscale
from tests.architectures import TABLE
from tests.test_upscale_extract import linear_group
from tests.vllm_runs import LENGTHS, assert_parity, prompts, vllm_engine
from upscale.growing.extract import extract_lora


def test_vllm_serves_the_adapters_of_one_base_as_peft_computes_them(tmp_path):
    group, out = linear_group(TABLE[0], tmp_path), tmp_path / "out"
    upscale.smile(group, out, energy=0.9, router_rank=1, rest="base")  # ranks differ between modules and experts
    adapters = {name: str(tmp_path / f"lora-{name}") for name in group.experts}
    ranks = [extract_lora(out, name, adapter).rank for name, adapter in adapters.items()]
    requests = prompts(LENGTHS)
    asked = [list(adapters)[number % 2] for number in range(len(requests))]
    lora = {name: LoRARequest(name, number, adapters[name]) for number, name in enumerate(adapters, start=1)}
    sampling = SamplingParams(max_tokens=8, temperature=0, logprobs=1, ignore_eos=True)
    with vllm_engine(group.base.location, enable_lora=True, max_loras=2, max_lora_rank=64) as llm:

        def answers(adapters):
            return llm.generate([{"prompt_token_ids": i} for i in requests], sampling, lora_request=adapters)

        mixed = answers([lora[name] for name in asked])
        plain = answers(None)
    assert max(ranks) <= 64
    base = AutoModelForCausalLM.from_pretrained(group.base.location)
    assert_parity(base, plain)
    models = PeftModel.from_pretrained(base, adapters["whole"], adapter_name="whole")
    models.load_adapter(adapters["part"], "part")
    for name, output in zip(asked, mixed, strict=True):
        models.set_adapter(name)
        assert_parity(models, [output])
