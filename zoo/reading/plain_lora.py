"""Which adapters are plain LoRA: the base's weights and a product of two small matrices, and nothing else."""

from collections.abc import Mapping
from pathlib import Path

from zoo.errors import CheckpointError

CONFIG = "adapter_config.json"
# What changes a LoRA into something else than base + B A, by the option of PEFT that asks for it.
_REFUSED = {
    "use_dora": "DoRA rescales the base's weights by a learnt norm, which no low-rank difference holds",
    "use_qalora": "QALoRA adds to groups of a quantised base's weights",
    "alora_invocation_tokens": "an activated LoRA applies to a part of the tokens only",
    "layer_replication": "it has more layers than its base",
    "target_parameters": "it changes parameters of experts that are stored together",
    "trainable_token_indices": "it trains single rows of the embeddings",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA rescales the base's weights",
    "arrow_config": "Arrow is a router over other adapters",
    "monteclora_config": "MonteCLoRA samples its weights",
    "velora_config": "VeLoRA",
}
# Initialisations that take their start out of the base's weights, so that B A alone is not the difference.
_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def require_plain(path: Path, settings: Mapping) -> None:
    """Raise CheckpointError, with the reason, unless ``adapter_config.json`` of ``path`` describes a plain LoRA."""
    if (kind := settings.get("peft_type")) != "LORA":
        raise CheckpointError(f"{path}: a PEFT adapter of type {kind}; only LoRA is a low-rank difference of weights")
    for option, reason in _REFUSED.items():
        if settings.get(option):
            raise CheckpointError(
                f"{path}: {option} is set: {reason}; merge it into its base (`merge_and_unload`, `save_pretrained`) "
                "and give the merged model"
            )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_FROM_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r}: its base's weights were changed at the start of training; save "
            "it with `path_initial_model_for_weight_conversion`, or merge it into its base and give the merged model"
        )
    if not isinstance(settings.get("r"), int) or not isinstance(settings.get("lora_alpha"), int | float):
        raise CheckpointError(f"{path / CONFIG}: lacks r or lora_alpha; fetch the file again")
