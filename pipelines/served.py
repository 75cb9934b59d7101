"""A registered defense as MLflow loads it: from code and model folders, nothing unpickled."""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from mlflow.models import set_model
from pydantic import TypeAdapter

from components.checkpoints import load, load_purifier
from components.defense import Defense
from components.purifiers import InferenceConfig


class ServedDefense(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Pixels (N,C,H,W) in [0,1] to purified pixels and logits: the code path that was attacked."""

    # MLflow would take type hints for a schema of its own kinds, and warns where there are none
    # past every filter.
    _skip_type_hint_validation = True

    def load_context(self, context: Any) -> None:
        """Load the model folders that were registered."""
        classifier = load(context.artifacts["classifier"])
        inference = (context.model_config or {}).get("inference")
        purifier = load_purifier(
            Path(context.artifacts["purifier"]),
            inference=TypeAdapter(InferenceConfig).validate_python(inference)
            if inference
            else None,
        )
        self.defense = Defense(classifier, purifier).freeze()

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return `purified` (N,C,H,W) and `logits` (N,K) as float32 arrays.

        Without type hints, since MLflow would take them for a schema.
        """
        x = torch.from_numpy(np.asarray(model_input, dtype=np.float32))
        with torch.no_grad():
            purified = self.defense.purify(x)
            logits = self.defense.classifier(purified)
        return {"purified": purified.numpy(), "logits": logits.numpy()}


set_model(ServedDefense())
