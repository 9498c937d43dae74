"""Push a checkpoint: its card first, then the check of its files, then all of it in one commit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from upscale.building.recipe import RECIPE, read_recipe, recipe_bytes
from upscale.errors import PublishError
from upscale.evaluating.results_file import read_results
from upscale.loading import locate, read_config
from upscale.publishing.card import MADE, card
from upscale.publishing.contents import contents, is_built
from upscale.publishing.sources import origins, public
from upscale.verifying.verify import verify
from zoo.errors import LicenceError
from zoo.hub.licences import combined, front_matter, licence_of
from zoo.hub.push import Pushed, Target, push
from zoo.writing.integrity import Progress

_RESULTS = "eval.json"


@dataclass(frozen=True)
class Parcel:
    """What would be pushed.

    Attributes:
        files: by name, paths or contents that differ from the file in the directory.
        card: the model card.
        licence: of the model.
        left_out: names of files in the directory that are not the checkpoint's.
        notes: what is sent otherwise than it stands in the directory, a line each.
    """

    files: dict[str, Path | bytes]
    card: str
    licence: str
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def pack(directory: str | Path, repo: str, licence: str | None = None) -> Parcel:
    """Put together what is sent for a checkpoint; asks nobody.

    The card is written anew, unless its last line was removed, which makes it the user's own. The directories of local
    sources and the rows of an evaluation, which quote its tasks, stay here.

    Args:
        directory: of the checkpoint.
        repo: ``org/name``, for the card.
        licence: the Hub's identifier or a name; None for what the card says or the most restrictive of the sources'.

    Raises:
        PublishError: not an upscaled checkpoint, or a card that is none.
        LicenceError: no licence is given, and it does not follow from the sources'.
        CheckpointError: a file is a link out of the directory.
    """
    directory = Path(directory)
    config = read_config(locate(directory))
    if "upscale" not in config or not (directory / RECIPE).is_file():
        raise PublishError(f"{directory}: not a checkpoint that upscale built; push others with `hf upload`")
    found, left_out = contents(directory)
    files: dict[str, Path | bytes] = dict(found)
    recipe, notes = read_recipe(found[RECIPE]), []
    if public(recipe) != recipe:
        files[RECIPE] = recipe_bytes(public(recipe))
        notes.append(f"{RECIPE} is sent without the directories of local sources")
    notes += [f"{name} names your home directory, which everybody will read" for name in _homely(files)]
    results = []
    if _RESULTS in found:
        results = read_results(found[_RESULTS])
        files[_RESULTS] = _without_rows(found[_RESULTS])
        notes.append(f"{_RESULTS} is sent without its rows, which quote the tasks")
    text = found["README.md"].read_text(encoding="utf-8") if "README.md" in found else MADE
    if MADE in text:
        licence = licence or combined({origin.role: origin.licence for origin in origins(recipe)})
        report = json.loads(found["report.json"].read_text()) if "report.json" in found else {}
        plots = [name for name in found if name.endswith((".png", ".svg"))]
        text = card(config, recipe, report, name=repo, licence=licence, results=results, plots=plots)
    else:
        text, licence = _own(text, licence, directory)
    files["README.md"] = text.encode()
    return Parcel(dict(sorted(files.items())), text, licence, tuple(left_out), tuple(notes))


def publish(parcel: Parcel, target: Target) -> Pushed:
    """Send a parcel.

    Raises:
        HubError: see ``zoo.hub.push.push``.
    """
    title = f"Push with upscale-zoo {version('upscale-zoo')}"
    return push(parcel.files, target, owned=is_built, title=title)


def check(directory: Path, progress: Progress | None = None) -> None:
    """Verify a checkpoint, in transformers but not in vLLM, which is started anew for each expert.

    Raises:
        PublishError: something is wrong with it.
    """
    found = verify(directory, engine="transformers", progress=progress)
    if problems := found.problems:
        more = f" (`upscale verify` names {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise PublishError(f"{directory}: {problems[0]}; build it again, or push with --no-verify{more}")


def _own(text: str, licence: str | None, directory: Path) -> tuple[str, str]:
    """A card that the user wrote, with the licence."""
    try:
        own = ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise PublishError(f"README.md: its metadata cannot be read: {' '.join(str(error).split())}") from error
    if licence is None:
        if (licence := licence_of(directory)) is None:
            raise LicenceError("which licence? README.md does not say one; write it there or give --licence ID")
        return text, licence
    for key, value in front_matter(licence).items():
        own.data[key] = value
    return str(own), licence


def _homely(files: Mapping[str, Path | bytes]) -> list[str]:
    """The settings in which a path of this user stands; of the base's, which are copied as they are."""
    home = str(Path.home()).encode() + b"/"
    settings = {name: file for name, file in files.items() if name.endswith(("config.json", ".yaml"))}
    return [n for n, f in settings.items() if home in (f.read_bytes() if isinstance(f, Path) else f)]


def _without_rows(file: Path) -> bytes:
    content = json.loads(file.read_text())
    content["results"] = [{**result, "rows": []} for result in content["results"]]
    return json.dumps({**content, "earlier": []}, indent=1).encode() + b"\n"
