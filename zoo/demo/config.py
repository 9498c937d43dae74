"""The recipe of the demo zoo."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoConfig:
    """Everything that decides the demo zoo's bytes, besides the code. The defaults train in minutes on two cores.

    Args:
        hidden_size: width of the model, a multiple of `head_dim`.
        head_dim: width of one attention head; vLLM's CPU attention takes 32 or 64.
        intermediate_size: width of the MLP.
        layers: number of decoder layers.
        base_steps: optimiser steps of the base model, on plain text.
        expert_steps: optimiser steps of each expert, on its task.
        batch_size: sequences per step.
        base_lr: peak learning rate of the base model.
        expert_lr: peak learning rate of each expert.
        test_rows: held-out rows written per task.
        prompts: prompts of the training split written per task, to calibrate a router with.
        seed: of initialisation and of all generated data.

    Raises:
        ValueError: if `hidden_size` is not a multiple of `head_dim`.
    """

    hidden_size: int = 128
    head_dim: int = 32
    intermediate_size: int = 352
    layers: int = 4
    base_steps: int = 400
    expert_steps: int = 400
    batch_size: int = 32
    base_lr: float = 3e-3
    expert_lr: float = 1.5e-3
    test_rows: int = 100
    prompts: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.head_dim:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of head_dim {self.head_dim}")
