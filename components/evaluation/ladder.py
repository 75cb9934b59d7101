"""The ladder: the rungs that say what an attacker knows of a defense, from least to most.

`transfer` and `classifier` replay images that were crafted against a bare classifier; on the other
rungs the attack runs against the defense itself in that gradient mode
(`components.models.defense`).
"""

from components.models.defense import STAND_INS

# Their order decides ties: of attacks that are equally strong on an image, the one on the earlier
# rung is credited with it.
MODES = ("transfer", "classifier", "bpda", *STAND_INS, "full", "fixed_noise")
# The baseline whose adversarial sets a rung replays: on `transfer` the surrogate, which the
# attacker trained; on `classifier` (grey box) the classifier behind the purifier.
REPLAYED = {"transfer": "surrogate", "classifier": "none"}
SURROGATE = REPLAYED["transfer"]
