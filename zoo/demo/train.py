"""Trains the demo zoo's models."""

import copy
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from zoo.demo.config import DemoConfig
from zoo.demo.corpus import Sequence, exercises, plain_text
from zoo.demo.tasks import TASKS
from zoo.demo.tokenizer import BOS, EOS, PAD, VOCAB_SIZE, save_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

MAX_LENGTH = 512
WARMUP_STEPS = 30
IGNORED = -100  # the label that transformers' loss skips


def train_models(directory: Path, config: DemoConfig, progress: Callable[[str], None]) -> None:
    """Train the base and every expert, and save each as a checkpoint.

    Args:
        directory: an existing directory; gets `base` and one subdirectory per task.
        config: the recipe.
        progress: called with the model's name after every optimiser step.

    Raises:
        OSError: if a checkpoint cannot be written.
    """
    base = _new_model(config)
    text = plain_text(_rng(config, "base"))
    _fit(base, text, config.base_steps, config.base_lr, config.batch_size, lambda: progress("base"))
    _save(base, directory / "base")
    for task in TASKS:
        expert = copy.deepcopy(base)
        solved = exercises(task, _rng(config, task))
        _fit(expert, solved, config.expert_steps, config.expert_lr, config.batch_size, lambda task=task: progress(task))
        _save(expert, directory / task)


def _rng(config: DemoConfig, purpose: str) -> random.Random:
    """Make the generator of one model's data, so that no model's data depends on another's."""
    return random.Random(f"{config.seed} train {purpose}")


def _new_model(config: DemoConfig) -> "LlamaForCausalLM":
    """Make an untrained model, leaving the caller's random state as it was."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    heads = config.hidden_size // config.head_dim
    shape = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=config.head_dim,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(shape)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False)
    return model


def _fit(
    model: "LlamaForCausalLM",
    sequences: Iterator[Sequence],
    steps: int,
    peak_lr: float,
    batch_size: int,
    after_step: Callable[[], None],
) -> None:
    """Train in place: AdamW, a short warm-up, then a linear decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, max(0.05, 1 - step / steps))
    )
    model.train()
    for _ in range(steps):
        tokens, labels = _batch(list(islice(sequences, batch_size)))
        model(input_ids=tokens, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        after_step()


def _batch(sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right; causal attention keeps the padding out of sight, so there is no mask."""
    length = max(len(sequence.tokens) for sequence in sequences)
    tokens = torch.full((len(sequences), length), PAD)
    labels = torch.full((len(sequences), length), IGNORED)
    for row, sequence in enumerate(sequences):
        end, ids = len(sequence.tokens), torch.tensor(sequence.tokens)
        tokens[row, :end] = ids
        labels[row, sequence.start : end] = ids[sequence.start :]
    return tokens, labels


def _save(model: "LlamaForCausalLM", directory: Path) -> None:
    """Write a checkpoint that transformers loads and vLLM serves."""
    # Part by part, because `model.save_pretrained` draws its own progress bar across ours.
    directory.mkdir()
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    save_tokenizer(directory, max_length=MAX_LENGTH)
