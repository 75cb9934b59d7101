"""Many checks at once: what is listed, what is expected to fail, and what is left alone."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import limpid
from components.data.draws import NoiseStream
from components.models.purifiers import Purifier
from limpid.testing import check_purifier, purifier_checks
from limpid.testing.toys import NoisyBlur

SHAPE = (1, 8, 8)
ROUNDS, LABELS = "differentiable_is_as_declared", "takes_images_and_noise_only"


class Rounds(Purifier):
    """Two faults: its gradient is zero, and it takes an argument more."""

    def purify(self, x: Tensor, stream: NoiseStream | None, labels: None = None) -> Tensor:
        return torch.round(x * 15) / 15


class Crashes(NoisyBlur):
    def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("no kernel")
        return super().purify(x, stream)


def test_one_error_lists_every_failed_check_by_name() -> None:
    with pytest.raises(AssertionError) as error:
        check_purifier(Rounds, shape=SHAPE)
    head, *lines = str(error.value).splitlines()
    assert head == "2 of 13 checks did not come out as expected:"
    assert [line.split(":")[0].strip() for line in lines] == [ROUNDS, LABELS]
    assert all(len(line.split(": ", 1)[1]) > 20 for line in lines)


def test_a_check_that_raises_another_error_is_listed_with_it() -> None:
    with pytest.raises(AssertionError, match="range: it raised RuntimeError: no kernel"):
        check_purifier(Crashes, shape=SHAPE)


def test_a_failure_that_is_expected_is_not_listed() -> None:
    expected = {ROUNDS: "it rounds", LABELS: "of old"}
    check_purifier(Rounds, shape=SHAPE, expected_to_fail=expected)
    with pytest.raises(AssertionError) as error:
        check_purifier(Rounds, shape=SHAPE, expected_to_fail={ROUNDS: "it rounds"})
    assert LABELS in str(error.value) and ROUNDS not in str(error.value)


def test_a_check_that_passes_against_expectation_is_listed() -> None:
    with pytest.raises(
        AssertionError, match=rf"{ROUNDS}: it passes but was expected to fail \(x\)"
    ):
        check_purifier(NoisyBlur, shape=SHAPE, expected_to_fail={ROUNDS: "x"})


def test_a_name_that_is_no_check_is_refused() -> None:
    with pytest.raises(ValueError, match=f"expected_to_fail names typo; the checks are .*{ROUNDS}"):
        check_purifier(NoisyBlur, shape=SHAPE, expected_to_fail={"typo": "x"})


@pytest.mark.parametrize("check", limpid.testing.purifier_checks(shape=SHAPE), ids=str)
def test_a_check_is_called_by_name(check: Callable[..., None]) -> None:
    check(NoisyBlur)


def test_a_check_does_the_same_every_time_and_leaves_the_global_stream() -> None:
    class Random(NoisyBlur):
        def purify(self, x: Tensor, stream: NoiseStream | None) -> Tensor:
            torch.rand(())
            seen.append(torch.initial_seed())
            return super().purify(x, stream)

    seen: list[int] = []
    check = next(each for each in purifier_checks(shape=SHAPE) if "fresh" in each.name)
    state = torch.get_rng_state()
    check(Random)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(seen) == {0}


def test_the_checks_need_no_pytest_and_limpid_no_torch() -> None:
    """In a process where pytest cannot be imported."""
    code = (
        "import sys; sys.modules['pytest'] = None; import limpid; "
        "assert 'torch' not in sys.modules; limpid.testing.check_purifier; "
        "assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
