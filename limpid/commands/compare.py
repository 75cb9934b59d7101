"""Compare two verdicts on the same images by a paired test.

`limpid compare A B`: each a folder that `limpid attack --out` wrote, a project, or a metrics.json
beside its scores.parquet; `A:NAME` says which defense. The test is the exact paired one of the
verdicts (McNemar's, for deterministic defenses), in both directions, at p < 0.01.

Exit codes: 0 whatever was found, 2 verdicts that cannot be compared, 3 files that cannot be read.
"""

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("A", "B"):
        parser.add_argument(name, help="a folder with a verdict, a project, or a metrics.json")
    options = parser.parse_args(argv)
    # Imports torch.
    from limpid import comparing

    one, other = comparing.read(options.A), comparing.read(options.B)
    found = comparing.compared(one, other)
    print(f"robust accuracy (worst of all attacks), {one.threat}, n = {len(one.ids)} test images")
    print(f"A  {one.sentence()}")
    print(f"B  {other.sentence()}")
    print(
        f"A less B: {100 * found.mean:+.1f} points, paired 95 % interval {100 * found.low:+.1f} to "
        f"{100 * found.high:+.1f}; {found.gained} images stand better in A, {found.lost} in B; p = "
        f"{found.p_higher:.2g} that A is higher, {found.p_lower:.2g} that B is"
    )
    for sentence in comparing.claims(one, other, found):
        print(sentence)
    return 0
