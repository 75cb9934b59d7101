"""A registered defense as MLflow loads it: from code and model folders, nothing unpickled.

A request is images, alone or as {"images", "white", "seed"}; docs/serving.md is its manual. No
signature is registered, so that MLflow casts, drops and adds nothing: with a signature, whole
numbers would become floats before their scale is read, and unknown params would vanish.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from pydantic import TypeAdapter
from torch import Tensor

import components
from components import serving
from components.models.checkpoints import load, load_purifier, read_card
from components.models.defense import Defense
from components.models.purifiers import InferenceConfig

# Images of one request at most.
MAX_IMAGES = 10_000
# Images purified at once: no profile scores larger batches, so these equal those that were scored.
BATCH = 250
KEYS = ("images", "white", "seed")

_log = logging.getLogger(__name__)


class ServingError(MlflowException):  # type: ignore[misc]
    """An error whose one sentence is all that the caller sees.

    To the message of any other error the scoring server adds the whole request.
    """

    def serialize_as_json(self) -> str:
        """Return the body of the HTTP answer."""
        return json.dumps({"error_code": self.error_code, "message": self.args[0]})


class ServedDefense(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Purifies and classifies images by the code path that was attacked and scored."""

    # MLflow would read type hints as a schema; without any, it warns past every filter.
    _skip_type_hint_validation = True

    def load_context(self, context: Any) -> None:
        """Load the registered model folders.

        Raises ServingError, in one sentence, where model folders, code, settings, figures or
        verdict are not those that were scored and registered.
        """
        folder = Path(context.artifacts["classifier"])
        config = context.model_config or {}
        self._require_seal(context.artifacts, config)
        card = read_card(folder)
        self.shape, self.class_names = tuple(card.shape), card.class_names
        inference = config.get("inference")
        purifier = load_purifier(
            Path(context.artifacts["purifier"]),
            inference=TypeAdapter(InferenceConfig).validate_python(inference)
            if inference
            else None,
        )
        self.defense = Defense(load(folder), purifier).freeze()
        if self.defense.digest != config["digest"]:
            raise _refusal(
                "this is not the defense that was scored: its weights, settings or code differ "
                f"(scored {config['digest'][:12]}, found {self.defense.digest[:12]})"
            )
        scored = config["scored"]
        self.digest, self.verdict = config["digest"], scored["verdict"]
        self.failed = [name for name in scored["blocking_failed"].split(", ") if name]
        _log.info("defense %s, %s", self.digest[:12], self.verdict)
        if self.failed or scored["measurement valid"] != "yes":
            failed = ", ".join(self.failed) or "unknown"
            _log.warning("its measurement is not valid, failed checks: %s", failed)

    @staticmethod
    def _require_seal(artifacts: Mapping[str, str], config: Mapping[str, Any]) -> None:
        """Raise ServingError where a file or the config is not as it was registered."""
        if not config.get("seal"):
            raise _refusal(
                "this version does not say what was scored: register it by `limpid promote --sync`"
            )
        parts = {key: Path(artifacts[key]) for key in ("classifier", "purifier")}
        code = Path(components.__file__).parent
        found = serving.seal({**parts, "components": code, "served": Path(__file__)}, config)
        if found != config["seal"]:
            raise _refusal(
                "this is not what was registered: its model folders, code, settings, figures or "
                f"verdict differ (registered {config['seal'][:12]}, found {found[:12]})"
            )

    def predict(self, context, model_input):  # type: ignore[no-untyped-def]
        """Return arrays over the images: `purified` (N,C,H,W), `logits` (N,K), `label` (N,) names,
        `reconstruction_error` (N,) and `attack_score` (N,).

        Numbers that are not finite become None, and so does the label of their image. Raises
        ServingError for a request that cannot be answered. Has no type hints, which MLflow would
        read as a schema.
        """
        x, seed = read_request(model_input, self.shape)
        try:
            predicted = serving.predict(self.defense, x, seed, BATCH)
        except Exception as error:
            # Otherwise the server answers that the request was bad, and sends the traceback along.
            _log.exception("the defense failed")
            kind = type(error).__name__
            raise ServingError(f"the defense failed on this request ({kind})") from None
        names = np.array([*self.class_names, None], dtype=object)
        best = torch.where(predicted.logits.isfinite().all(1), predicted.logits.argmax(1), -1)
        return {
            "purified": _json_ready(predicted.purified),
            "logits": _json_ready(predicted.logits),
            "label": names[best.numpy()],
            "reconstruction_error": _json_ready(predicted.error),
            "attack_score": _json_ready(predicted.detector_score),
        }


def read_request(request: Any, shape: tuple[int, ...]) -> tuple[Tensor, int | None]:
    """Return the pixels (N,*shape) float32 in [0,1] of a request, and its seed if it has one.

    Raises ServingError, in one sentence, for a request that is not valid.
    """
    parts = request if isinstance(request, dict) else {"images": request}
    unknown = [str(key) for key in parts if key not in KEYS]
    if unknown or "images" not in parts:
        wrong = f"has {', '.join(unknown)}" if unknown else "lacks images"
        raise _refusal(
            f"a request is images, with {' and '.join(KEYS[1:])} as needed; this {wrong}"
        )
    images = _numbers("images", parts["images"])
    if images.shape[1:] != shape or not 1 <= len(images) <= MAX_IMAGES:
        wanted = ", ".join(map(str, shape))
        raise _refusal(
            f"images must be of shape (N, {wanted}) with N from 1 to {MAX_IMAGES}, "
            f"not {images.shape}"
        )
    white = _white(images, parts.get("white"))
    low, high = images.min(), images.max()
    # Written so that nan is refused as well.
    if not (low >= 0 and high <= white):
        raise _refusal(
            f"these pixels go from {low} to {high}, but fractions must lie in [0, 1] and whole "
            "numbers in [0, 255]"
        )
    pixels = torch.from_numpy(images.astype(np.float32))
    return pixels / white, _seed(parts.get("seed"))


def _white(images: npt.NDArray[Any], declared: Any) -> int:
    """Return the value of a white pixel: as declared, else as the numbers show.

    JSON has no types. Fractions reach to 1 and bytes to 255; whole numbers of which none is over 1
    may be either, and are refused.
    """
    if declared is not None:
        white = _numbers("white", declared)
        if white.ndim or white not in (1, 255):
            raise _refusal(f"white is the value of a white pixel, 1 or 255, not {declared}")
        return int(white)
    if images.dtype == np.uint8:
        return 255
    if images.dtype.kind == "f":
        return 1
    if images.max() > 1:
        return 255
    raise _refusal(
        'whole numbers of which none is over 1 may be fractions or bytes: say "white": 1 or '
        '"white": 255 beside the images'
    )


def _seed(given: Any) -> int | None:
    if given is None:
        return None
    seed = _numbers("seed", given)
    if seed.ndim or seed.dtype.kind not in "iu" or seed < 0:
        raise _refusal(f"seed must be one whole number from 0, not {given}")
    return int(seed)


def _numbers(name: str, given: Any) -> npt.NDArray[Any]:
    """Return an array of integers or floats."""
    try:
        array = np.asarray(given)
    except ValueError:
        raise _refusal(f"{name} must be even: all lists in it of equal length") from None
    if array.dtype.kind not in "fiu":
        raise _refusal(f"{name} must be numbers and nothing else, such as text, null or true")
    return array


def _refusal(sentence: str) -> ServingError:
    refusal: ServingError = ServingError.invalid_parameter_value(sentence)
    return refusal


def _json_ready(values: Tensor) -> npt.NDArray[Any]:
    """Return the values with None for each that is not finite: JSON has null, but no NaN."""
    array: npt.NDArray[Any] = values.numpy()
    finite = np.isfinite(array)
    if not finite.all():
        array = array.astype(object)
        array[~finite] = None
    return array


set_model(ServedDefense())
