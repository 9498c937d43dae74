"""LoRA adapters made by PEFT itself, with weights that matter."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def save_adapter(base: Path, directory: Path, seed: int = 1, *, scale: float = 0.05, **options) -> Path:
    """An adapter on the model in ``base``: all that it trains is random. ``options`` are LoraConfig's."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)
    return directory


def with_adapter(base: Path, adapter: Path):
    """The base with the adapter on it, not merged, in float32."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """PEFT's own merge of the two, by the names of transformers' model."""
    return dict(with_adapter(base, adapter).merge_and_unload().state_dict())
