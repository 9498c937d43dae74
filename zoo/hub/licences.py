"""Licences of models: read from their cards, and the one that a model made of several of them can have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.errors import LicenceError

# Each lets what it covers be part of something under any licence after it, and under any that is not listed here.
_PERMISSIVE = ("cc0-1.0", "unlicense", "isc", "mit", "bsd-2-clause", "bsd-3-clause", "apache-2.0")
# What is under the first may be part of something under the second.
_STRICTER = {
    ("lgpl-3.0", "gpl-3.0"),
    ("lgpl-3.0", "agpl-3.0"),
    ("gpl-3.0", "agpl-3.0"),
    ("cc-by-4.0", "cc-by-sa-4.0"),
    ("cc-by-4.0", "cc-by-nc-4.0"),
    ("cc-by-4.0", "cc-by-nc-sa-4.0"),
    ("cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
}
# The Hub's identifiers.
_HUB = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research isc
lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa
odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 pddl postgresql unlicense wtfpl zlib
"""
_UNSAID = {"", "other", "unknown"}  # what the Hub's cards have for a licence without a name


def licence_of(directory: Path) -> str | None:
    """The licence that a model's card (``README.md``) names, in lower case; None if it names none.

    For a licence of the Hub's list that is its identifier (``apache-2.0``), for another its own name.
    """
    import yaml
    from huggingface_hub import metadata_load

    try:
        said = metadata_load(directory / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):  # no card, or none that can be read, names none
        return None
    licence = said.get("license")
    if isinstance(licence, list) and len(licence) == 1:
        licence = licence[0]
    if licence == "other":
        licence = said.get("license_name")
    name = licence.strip().lower() if isinstance(licence, str) else ""
    return None if name in _UNSAID else name


def combined(licences: Mapping[str, str | None]) -> str:
    """The most restrictive of the licences of a model's sources.

    Args:
        licences: by source; None where a source names none.

    Raises:
        LicenceError: a source names none or forbids derivatives, or two of them cannot be compared.
    """
    said = {licence for licence in licences.values() if licence is not None}
    table = ", ".join(f"{source}: {licence or 'not said'}" for source, licence in licences.items())
    if None in licences.values() or not said:
        raise LicenceError(f"which licence? {table}; read what their pages say and give --licence ID")
    if forbidding := [source for source, licence in licences.items() if licence and "-nd-" in licence]:
        raise LicenceError(f"{forbidding[0]} may not be changed by its licence ({table}); ask its authors")
    for licence in sorted(said):
        if all(_allows(other, licence) for other in said):
            return licence
    raise LicenceError(f"which licence? {table}: none of them covers the others; read them and give --licence ID")


def _allows(licence: str, whole: str) -> bool:
    """Whether something under ``licence`` may be part of something under ``whole``."""
    if licence == whole or (licence, whole) in _STRICTER:
        return True
    if licence not in _PERMISSIVE:
        return False
    return whole not in _PERMISSIVE or _PERMISSIVE.index(licence) < _PERMISSIVE.index(whole)


def front_matter(licence: str | None) -> dict[str, Any]:
    """How a card's metadata say a licence; one that is not of the Hub's list is "other", with its name."""
    if licence is None:
        return {}
    return {"license": licence} if licence in _HUB.split() else {"license": "other", "license_name": licence}
