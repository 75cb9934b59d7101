"""The defense under attack, as model folders that a worker can load."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from components.config import Config
from components.data.image_set import ImageSet
from components.models.checkpoints import fingerprint, load, load_purifier, read_card, require_fit
from components.models.defense import Defense
from components.models.purifiers import Inference, Purifier


@dataclass(frozen=True)
class Subject:
    """The defense under attack: a classifier folder with a purifier folder, a control or neither.

    `inference` says how the network of the purifier folder is used.
    """

    classifier: Path
    purifier: Path | None = None
    control: Config | None = None
    inference: Inference | None = None

    @property
    def bare(self) -> bool:
        """Whether the classifier stands alone."""
        return self.purifier is None and self.control is None

    def require_fit(self, images: ImageSet) -> None:
        """Raise ValueError where a model is none of its half, or for other images or classes."""
        for half, folder in (("classifier", self.classifier), ("purifier", self.purifier)):
            if folder is None:
                continue
            family = read_card(folder).family
            if family != half:
                raise ValueError(f"{folder} holds a {family}, and a {half} is needed here")
            require_fit(folder, images)

    def defense(self, device: str = "cpu") -> Defense:
        """Load the defense, frozen."""
        classifier = load(self.classifier, device)
        purifier: Purifier | None = None
        if self.purifier is not None:
            purifier = load_purifier(self.purifier, device, self.inference)
        elif self.control is not None:
            shape = read_card(self.classifier).shape
            purifier = self.control.build(tuple(shape))  # type: ignore[attr-defined]
        return Defense(classifier, purifier).freeze().to(device)

    def stand_ins(self) -> Sequence[str]:
        """Return the names of the purifier's stand-ins."""
        return self._traits.stand_ins

    def differentiable(self) -> bool:
        """Say whether the exact gradient is usable."""
        return self._traits.differentiable

    def stochastic(self) -> bool:
        """Say whether the logits depend on noise."""
        return self._traits.stochastic

    def rough(self) -> bool:
        """Say whether the purifier descends or rounds, so that a last bit may become a label."""
        return bool(self.stand_ins()) or not self.differentiable()

    @cached_property
    def _traits(self) -> "_Traits":
        """Load the networks, once."""
        defense = self.defense()
        stand_ins = () if defense.purifier is None else defense.purifier.stand_ins
        return _Traits(stand_ins, defense.differentiable, defense.stochastic, defense.digest)

    def digest(self) -> str:
        """Return the identity of the defense, which salts its noise."""
        return self._traits.digest

    def facts(self) -> dict[str, str]:
        """Return the digests that identify the models, and what they are and run in together."""
        purifier = "none"
        if self.purifier is not None:
            purifier = fingerprint(self.purifier)
        elif self.control is not None:
            purifier = hashlib.sha256(self.control.model_dump_json().encode()).hexdigest()
        inference = "none" if self.inference is None else self.inference.model_dump_json()
        return {
            "classifier": fingerprint(self.classifier),
            "purifier": purifier,
            "inference": inference,
            "defense": self.digest(),
        }


@dataclass(frozen=True)
class _Traits:
    """What a defense says of itself once it is loaded; `digest` is its identity."""

    stand_ins: Sequence[str]
    differentiable: bool
    stochastic: bool
    digest: str
