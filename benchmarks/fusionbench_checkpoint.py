"""A small SMILE checkpoint made by FusionBench itself, and its logits; fusionbench_import.py converts it.

It runs in the peer's environment (peer-requirements.txt) and imports nothing of ours.

    cd benchmarks
    .venv-peer/bin/python fusionbench_checkpoint.py OUT --architecture qwen2 --rank 8 --router-rank 4 --top-k 1

OUT gets `base`, `e1` and so on, the `smile` checkpoint that FusionBench saves, and `logits.safetensors` with `tokens`
[B, T] and `logits` [B, T, V]. Two traps of FusionBench's own are seen to:

- The object that its upscaling returns has lost its rotary frequencies (`to_empty`), so the logits are those of the
  checkpoint saved and loaded again.
- A linear that no expert changed is saved as a plain `P.weight`, for which its loading has no place: it leaves that
  linear with random weights and says so in a warning. The logits are of the model with that linear put back as the
  plain one that it was when it was saved.

As released, its Mistral does not run with the transformers of peer-requirements.txt, as its Llama and Qwen2 do: it
makes rotary embeddings as older versions did. `rotary` takes that call; nothing else of FusionBench's is touched.
"""

import argparse
from pathlib import Path

import fusion_bench.models.modeling_smile_mistral.modeling_smile_mistral as smile_mistral
import torch
from fusion_bench.method.smile_upscaling.causal_lm_upscaling import SmileCausalLMUpscalingAlgorithm
from fusion_bench.modelpool import CausalLMPool
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

SHAPE = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "rope_theta": 50000.0,  # no default's, so that a lost one shows
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "llama-biased": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    # Without its own head_dim, transformers 4.57's configuration has none, which FusionBench's Mistral then multiplies.
    "mistral": lambda: MistralConfig(**SHAPE, head_dim=32, tie_word_embeddings=False, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),  # biases on q, k, v
}
UNTOUCHED = "model.layers.1.mlp.up_proj"  # by any expert
BY_FIRST = "model.layers.0.mlp.down_proj"  # changed by the first expert alone


def rotary(dim: int, max_position_embeddings: int, base: float) -> nn.Module:
    """Today's rotary embedding from the arguments that older versions took."""
    settings = {"head_dim": dim, "max_position_embeddings": max_position_embeddings, "rope_theta": base}
    return MistralRotaryEmbedding(MistralConfig(**settings))


def make_group(out: Path, architecture: str, experts: int) -> dict[str, str]:
    """Random base and fine-tunes of it, float32, by name."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture](), torch_dtype=torch.float32)
    vocabulary = {f"t{n}": n for n in range(SHAPE["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="t0")))
    for parameter in model.parameters():
        parameter.data = parameter + (0.02 if parameter.ndim == 2 else 0.1) * torch.randn_like(parameter)
    base = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    names = ["_pretrained_", *(f"e{n + 1}" for n in range(experts))]
    places = {name: str(out / name.strip("_").replace("pretrained", "base")) for name in names}
    for number, place in enumerate(places.values()):
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            changed = number and not name.startswith(UNTOUCHED) and (number == 1 or not name.startswith(BY_FIRST))
            parameter.data = base[name] + (0.1 * torch.randn_like(parameter) if changed else 0.0)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return places


def reload(place: Path) -> nn.Module:
    """FusionBench's own loading, with the linears put back that it leaves random."""
    model = AutoModelForCausalLM.from_pretrained(place, torch_dtype=torch.float32).eval()
    stored = load_file(place / "model.safetensors")
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "SmileLinear" and f"{name}.weight" in stored:
            plain = nn.Linear(module.in_features, module.out_features, bias=f"{name}.bias" in stored)
            plain.load_state_dict({key: stored[f"{name}.{key}"] for key in plain.state_dict()})
            model.set_submodule(name, plain)
    return model


def main() -> None:
    """Make the checkpoint and its logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--architecture", choices=CONFIGS, required=True)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--rank", type=int, required=True, help="0 or less: dense experts")
    parser.add_argument("--router-rank", type=int, required=True)
    parser.add_argument("--top-k", type=int, required=True)
    args = parser.parse_args()

    smile_mistral.MistralRotaryEmbedding = rotary
    places = make_group(args.out, args.architecture, args.experts)
    algorithm = SmileCausalLMUpscalingAlgorithm(
        device="cpu",
        accelerator="cpu",
        model_save_path=str(args.out / "smile"),
        model_dtype="float32",
        num_experts_per_tok=args.top_k,
        rank_of_router=args.router_rank,
        rank_of_expert=args.rank,
    )
    pool = CausalLMPool(models=places, tokenizer=places["_pretrained_"], model_kwargs={"torch_dtype": "float32"})
    algorithm.run(pool)
    tokens = torch.randint(3, SHAPE["vocab_size"], (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = reload(args.out / "smile")(input_ids=tokens, use_cache=False).logits
        base = (
            AutoModelForCausalLM.from_pretrained(places["_pretrained_"])
            .eval()(input_ids=tokens, use_cache=False)
            .logits
        )
    save_file({"tokens": tokens, "logits": logits, "base": base}, args.out / "logits.safetensors")


if __name__ == "__main__":
    main()
