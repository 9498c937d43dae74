"""Build the benchmark's group: a Llama-shaped base and experts that differ from it in every linear layer.

Weights are random and seeded. A delta is a low-rank signal with decaying singular values plus full-rank noise, which is
the spectrum that fine-tuning leaves: a truncation keeps most of it, never all. One tensor at a time is computed and one
layer at a time is held, so memory stays small.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

READY = "group.json"  # written last: the group is whole when this holds the settings asked for


@dataclass(frozen=True)
class Spec:
    """What the group is made of; the same settings give the same bytes."""

    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 4
    heads: int = 16
    vocab: int = 1024
    experts: int = 3
    seed: int = 0
    relative_norm: float = 0.05  # ||delta|| / ||base||, per tensor
    signal_rank: int = 64  # with singular values 1, 1/2, 1/3, ...
    noise_energy: float = 0.2  # share of ||delta||^2 that is full-rank noise

    @property
    def names(self) -> list[str]:
        """Name the experts: e1, e2, ..."""
        return [f"e{i + 1}" for i in range(self.experts)]

    def linears(self) -> dict[str, tuple[int, int]]:
        """Give the shape [out, in] of every linear of one layer."""
        h, m = self.hidden, self.intermediate
        attention = {f"self_attn.{n}_proj": (h, h) for n in "qkvo"}
        return attention | {"mlp.gate_proj": (m, h), "mlp.up_proj": (m, h), "mlp.down_proj": (h, m)}


def make_delta(base: Tensor, spec: Spec, rng: torch.Generator) -> Tensor:
    """Draw one expert's delta for a base weight, in float32."""
    out_features, in_features = base.shape
    values = 1 / torch.arange(1, spec.signal_rank + 1)
    left = torch.linalg.qr(torch.randn(out_features, spec.signal_rank, generator=rng))[0]
    right = torch.linalg.qr(torch.randn(in_features, spec.signal_rank, generator=rng))[0]
    signal = (left * values) @ right.T
    noise = torch.randn(out_features, in_features, generator=rng)
    signal *= (1 - spec.noise_energy) ** 0.5 / signal.norm()
    noise *= spec.noise_energy**0.5 / noise.norm()
    return (signal + noise) * (spec.relative_norm * base.norm())


def write_config(directory: Path, spec: Spec) -> None:
    """Write config.json and a small word-level tokenizer."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.heads,
        "head_dim": spec.hidden // spec.heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": spec.vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    words = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(3, spec.vocab)]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": word, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, word in enumerate(words[:3])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    files = {"config.json": config, "tokenizer.json": tokenizer, "tokenizer_config.json": tokenizer_config}
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def build(root: Path, spec: Spec) -> None:
    """Write `root`/base and `root`/<expert>, one safetensors shard per layer and one for the rest."""
    if (root / READY).exists() and json.loads((root / READY).read_text()) == asdict(spec):
        return
    shutil.rmtree(root, ignore_errors=True)
    models = ["base", *spec.names]
    index: dict[str, str] = {}
    total = 0
    for model in models:
        (root / model).mkdir(parents=True)
        write_config(root / model, spec)

    def save(shard: int, tensors: dict[str, dict[str, Tensor]]) -> None:
        nonlocal total
        name = f"model-{shard:05d}-of-{spec.layers + 1:05d}.safetensors"
        for model, weights in tensors.items():
            save_file(weights, root / model / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors["base"], name))
        total += sum(weight.nbytes for weight in tensors["base"].values())

    rng = torch.Generator().manual_seed(spec.seed)
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}"
        norms = {
            f"{prefix}.{n}_layernorm.weight": torch.ones(spec.hidden, dtype=torch.bfloat16)
            for n in ("input", "post_attention")
        }
        tensors = {model: dict(norms) for model in models}
        for linear, (out_features, in_features) in spec.linears().items():
            name = f"{prefix}.{linear}.weight"
            base = (torch.randn(out_features, in_features, generator=rng) * in_features**-0.5).bfloat16()
            tensors["base"][name] = base
            for model in spec.names:
                tensors[model][name] = (base.float() + make_delta(base.float(), spec, rng)).bfloat16()
        save(layer + 1, tensors)

    shared = {
        name: (torch.randn(spec.vocab, spec.hidden, generator=rng) * 0.02).bfloat16()
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    shared["model.norm.weight"] = torch.ones(spec.hidden, dtype=torch.bfloat16)
    save(spec.layers + 1, dict.fromkeys(models, shared))

    for model in models:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (root / model / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")
    (root / READY).write_text(json.dumps(asdict(spec), indent=2) + "\n")


def write_adapters(root: Path, spec: Spec, names: Sequence[str], rank: int) -> None:
    """Write LoRA adapters in PEFT's own format on `root`/base, random in both factors of every linear."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [name.rsplit(".", 1)[1] for name in spec.linears()],
        "base_model_name_or_path": str(root / "base"),
    }
    for seed, adapter in enumerate(names):
        rng = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in range(spec.layers):
            for linear, (o, i) in spec.linears().items():
                name = f"base_model.model.model.layers.{layer}.{linear}"
                tensors[f"{name}.lora_A.weight"] = (torch.randn(rank, i, generator=rng) * i**-0.5).bfloat16()
                tensors[f"{name}.lora_B.weight"] = (torch.randn(o, rank, generator=rng) * 0.01).bfloat16()
        (root / adapter).mkdir(exist_ok=True)
        save_file(tensors, root / adapter / "adapter_model.safetensors")
        (root / adapter / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    """Build the group where the command line says, unless it is there already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    build(parser.parse_args().root, Spec())


if __name__ == "__main__":
    main()
