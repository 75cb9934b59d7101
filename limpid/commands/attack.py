"""Attack a classifier or defense of yours, and say what it is worth.

`limpid attack my_module:make_defense --data DIR --threat linf:8/255` calls the function, which
returns a classifier, a pair (classifier, purifier) or a Defense, and does what `limpid.evaluate`
does. `--quick` gives an upper bound in a fraction of the time.

Exit codes: 0, 2 a command or networks that cannot be judged, 3 images or files that cannot be
used, 4 infrastructure, 130 interrupted, 5 a blocking check failed, the lower bound of the 95 %
interval is under `--fail-under`, or robust accuracy is significantly lower than in `--baseline`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import ConfigError

NETWORKS = ("classifier", "purifier", "unseen")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; raise Failed where the networks do not pass."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "factory", help="module:function or file.py:function, which returns the networks"
    )
    parser.add_argument(
        "--weights", action="append", default=[], metavar="[NETWORK=]FILE",
        help="safetensors, or a state dict of torch.save; NETWORK is classifier (default), "
        "purifier or unseen",
    )  # fmt: skip
    images = parser.add_argument_group("images")
    images.add_argument(
        "--data", type=Path, required=True, metavar="DIR",
        help="test images: what prepare_data wrote, Parquet files, or one folder for each class",
    )  # fmt: skip
    images.add_argument(
        "--n", type=int, help="how many are attacked, in proportion to classes (1000, or all)"
    )
    images.add_argument(
        "--validation", type=Path, metavar="DIR",
        help="labelled images that nobody scores, for checks that need them",
    )  # fmt: skip
    images.add_argument(
        "--rung", action="append", default=[], metavar="NAME=FILE",
        help="a Parquet file of adversarial images of your own, inside the threat",
    )  # fmt: skip
    how = parser.add_argument_group("attacks")
    how.add_argument("--threat", default="linf:8/255", help="linf:8/255 (default) or l2:0.5")
    ladder = how.add_mutually_exclusive_group()
    ladder.add_argument("--quick", action="store_true", help="an upper bound, quickly")
    ladder.add_argument("--ladder", type=Path, metavar="YAML", help="rungs with their attacks")
    how.add_argument(
        "--unseen", metavar="FACTORY", help="returns a classifier that played no part in training"
    )
    how.add_argument("--batch", type=int, default=250)
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")
    after = parser.add_argument_group("verdict")
    after.add_argument(
        "--out", type=Path, metavar="DIR", help="keeps metrics, scores, images and the report"
    )
    after.add_argument(
        "--fail-under", type=float, metavar="X",
        help="exit 5 if the lower bound of robust accuracy is under X; an upper bound, as of "
        "--quick, can fail and never proves that it passes",
    )  # fmt: skip
    after.add_argument(
        "--baseline", metavar="METRICS",
        help="exit 5 if robust accuracy is lower than in this metrics.json, on the same images "
        "(paired test, p < 0.01)",
    )  # fmt: skip
    after.add_argument("--junit", type=Path, metavar="XML", help="writes the checks as test cases")
    options = parser.parse_args(argv)
    options.weights = _weights(options.weights)
    options.rung = _named("--rung", options.rung)
    _require_numbers(options)
    # Imports torch.
    from limpid.commands import _attacking

    return _attacking.attack(options)


def _weights(words: Sequence[str]) -> dict[str, Path]:
    """Return the files of weights by network; without a name it is the classifier's."""
    named = [
        w if w.partition("=")[0] in NETWORKS and "=" in w else f"classifier={w}" for w in words
    ]
    return _named("--weights", named)


def _named(option: str, words: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for word in words:
        name, _, path = word.partition("=")
        if not name or not path or name in found:
            problem = "is there twice" if name in found else "has no name and file"
            raise ConfigError(f"{option} {word} {problem}; write {option} NAME=FILE for each")
        found[name] = Path(path)
    return found


def _require_numbers(options: argparse.Namespace) -> None:
    """Raise ConfigError for a number that can be none."""
    bound = options.fail_under
    if bound is not None and not 0 <= bound <= 1:
        raise ConfigError(
            f"--fail-under is {bound:g}; robust accuracy lies in [0,1], so 45 % is 0.45"
        )
    if options.batch < 1:
        raise ConfigError(f"--batch is {options.batch}; it is 1 or more")
