"""Ways to damage a checkpoint, and what a verification finds then."""

import hashlib
import json
import struct
from pathlib import Path

from safetensors.torch import load_file, save_file

from zoo import Checkpoint

Q = "model.layers.0.self_attn.q_proj"


def failed(report) -> dict[str, list[str]]:
    return {finding.check: list(finding.problems) for finding in report.findings if finding.status == "failed"}


def flip(out: Path, tensor: str) -> None:
    """The last bit of a tensor's first number."""
    file = Checkpoint.open(out).tensors[tensor].file
    with file.open("r+b") as content:
        length = struct.unpack("<Q", content.read(8))[0]
        begin = json.loads(content.read(length))[tensor]["data_offsets"][0]
        content.seek(8 + length + begin)
        byte = content.read(1)[0]
        content.seek(8 + length + begin)
        content.write(bytes([byte ^ 1]))


def change(out: Path, tensor: str, make) -> None:
    """Other values, of which ``checksums.json`` knows: None takes the tensor away."""
    tensors, file = load_file(out / "model.safetensors"), out / "checksums.json"
    sums = json.loads(file.read_text())
    if (value := make(tensors.pop(tensor))) is None:
        del sums["tensors"][tensor]
    else:
        tensors[tensor] = value.contiguous()
        sums["tensors"][tensor] = hashlib.sha256(tensors[tensor].numpy().tobytes()).hexdigest()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    file.write_text(json.dumps(sums))


def reconfigure(out: Path, make) -> None:
    config = json.loads((out / "config.json").read_text())
    make(config["upscale"])
    (out / "config.json").write_text(json.dumps(config))
