"""Import a network of one's own, by the function that makes it.

Reads the code and the weights, and data/val to try the network on, writes models/<name>.
"""

from pathlib import Path
from typing import Any

from components.data import image_set
from components.data.image_set import ImageSet
from components.data.shards import sha256
from components.models.accuracy import count_correct
from components.models.checkpoints import ModelCard, load, save
from components.models.defense import Defense
from components.models.external import import_network, read_code, require_equal
from components.models.foreign import resizing
from pipelines.config.sections import External
from pipelines.config.views import SharedView
from pipelines.runner.context import Context

# Its code lies on this machine, whatever cluster is named; all other stages read the model folder.
LOCAL = True
# On so many images it is compared with what its folder makes.
TRIED = 8


class ExternalParams(SharedView):
    """One entry of `external`."""

    external: External
    tracks = {**SharedView.tracks, "external": "external.{name}"}


def run(
    params: ExternalParams, context: Context, *, name: str, code: Path, weights: Path, val: Path,
    out: Path,
) -> dict[str, float]:  # fmt: skip
    """Import the network called `name`; `weights` is `code` again where there is no such file."""
    section, images = params.external, image_set.read(val)
    files, stored = read_code(code), None if weights == code else weights
    network, family, found = import_network(
        files, section.factory, section.arguments, stored, images.pixels(), len(images.class_names)
    )
    facts = _validated(network, images, params) if family == "classifier" else {}
    if note := resizing(network):
        context.progress.say(f"{name} {note}")
        facts["note"] = note
    card = ModelCard(
        format=1, family=family, model=found.model_dump(mode="json"), shape=list(images.shape),
        class_names=list(images.class_names),
        provenance={**facts, "weights": sha256(stored) if stored else None},
    )  # fmt: skip
    save(out, network, card, files)
    require_equal(network, load(out), images.pixels()[:TRIED])
    right = facts.get("validation")
    return {"val_accuracy": right["correct"] / right["n"]} if right else {}


def _validated(network: Any, images: ImageSet, params: SharedView) -> dict[str, Any]:
    counts = count_correct(
        Defense(network, None), images.pixels(), images.labels, images.ids, params.seed, "train", 1,
        params.batch,
    )  # fmt: skip
    return {"validation": {"correct": int(counts.sum()), "n": len(images)}}
