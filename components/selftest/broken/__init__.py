"""Eight defenses that the field broke, written from their papers for 8 x 8 digits.

Each is what an honest author would hand in: it computes what its paper says, draws its noise from
the stream, and declares truly whether it is random and whether it has a gradient. What was wrong is
how it was evaluated. `BROKEN` builds them, each with the net that it protects, trained normally;
`judge` evaluates them as it would any other defense.
"""

from collections.abc import Callable

from components.selftest.broken.descents import anti_adversary, self_supervised
from components.selftest.broken.ladder import Attacked, Ladder, Verdict, attack, close, judge
from components.selftest.broken.networks import (
    k_wta,
    mixup_inference,
    stable_ode,
    thermometer,
)
from components.selftest.broken.parts import Built
from components.selftest.broken.transforms import pixel_deflection, total_variation
from components.selftest.toy import Toy

__all__ = ["BROKEN", "Attacked", "Built", "Ladder", "Verdict", "attack", "close", "judge"]

BROKEN: dict[str, Callable[[Toy], Built]] = {
    "k-WTA": k_wta,
    "thermometer encoding": thermometer,
    "total variation": total_variation,
    "pixel deflection": pixel_deflection,
    "anti-adversary": anti_adversary,
    "SOAP-like": self_supervised,
    "SODEF-like": stable_ode,
    "mixup inference": mixup_inference,
}
