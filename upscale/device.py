"""Where tensors are computed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from upscale.errors import ConfigError


def usable_device(device: str) -> str:
    """The device that a setting means, "auto" for a GPU where there is one.

    Raises:
        ConfigError: tensors cannot be computed there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    return device


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within the context, compute on so many threads of the processor: how sums are rounded depends on it.

    None: on as many as before.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_device(device: str) -> None:
    """Raise ConfigError unless tensors can be computed on ``device``."""
    try:
        torch.zeros(1, device=device).item()  # read back: `meta` makes tensors, but holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from error
