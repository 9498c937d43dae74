"""What runs an upscaled model. The other files here are copied into every checkpoint as they stand.

So ``AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`` works without the package: they import only
each other, by relative imports, and transformers.
"""

from pathlib import Path


def runtime_files() -> dict[str, Path]:
    """The files that a checkpoint carries, by name."""
    return {path.name: path for path in sorted(Path(__file__).parent.glob("*_upscaled.py"))}
