"""Where tensors are computed."""

import torch

from upscale.errors import ConfigError


def check_device(device: str) -> None:
    """Raise ConfigError unless tensors can be computed on ``device``."""
    try:
        torch.zeros(1, device=device).item()  # read back: `meta` makes tensors, but holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from error
