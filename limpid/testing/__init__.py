"""The contract of purifiers, attacks and classifiers, as named checks for any test runner.

`check_purifier(make)` runs every check and raises one AssertionError that lists what failed;
`purifier_checks()` returns the checks one by one, for a runner that shows them by name. Attacks and
classifiers have the same two functions. Limpid's own tests hold every kind of its own to these
checks. `make` returns a fresh object at every call.
"""

from limpid.testing.attacks import attack_checks, check_attack
from limpid.testing.check import Check
from limpid.testing.classifiers import check_classifier, classifier_checks
from limpid.testing.purifiers import check_purifier, purifier_checks

__all__ = [
    "Check",
    "attack_checks",
    "check_attack",
    "check_classifier",
    "check_purifier",
    "classifier_checks",
    "purifier_checks",
]
