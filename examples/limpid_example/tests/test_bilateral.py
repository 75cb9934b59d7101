"""The filter keeps what every purifier of Limpid promises."""

import pytest
from limpid_example import Bilateral

from limpid.testing import Check, purifier_checks


@pytest.mark.parametrize("check", purifier_checks(shape=(3, 16, 16)), ids=str)
def test_it_keeps_the_contract(check: Check) -> None:
    check(lambda: Bilateral(kind="bilateral", radius=2))


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="radius 9 needs images of more pixels"):
        Bilateral(kind="bilateral", radius=9).build((1, 8, 8))
