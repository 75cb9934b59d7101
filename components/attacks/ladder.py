"""Carved out of pipelines/params.py."""

from components.models.defense import STAND_INS

# The rungs of the threat ladder, from what knows least of the defense to what knows all; between
# equal attacks the first carries an image. The first two replay what was crafted against a bare
# classifier: the baseline of this name, and the classifier under protection.
MODES = ("transfer", "classifier", "bpda", *STAND_INS, "full", "fixed_noise")
REPLAYED = {"transfer": "surrogate", "classifier": "none"}
SURROGATE = REPLAYED["transfer"]
