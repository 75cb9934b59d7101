"""Clean image files with a trained purifier.

`limpid purify --model FOLDER in.png [dir/] --out DIR` reads images as training reads them
(`components/sources/images.py`) and writes each as an 8-bit PNG of the same stem, whole or not at
all. Exit codes: 0, 2 a command that cannot be carried out, 3 a model or images that cannot be used
(all other images are cleaned), 4 a folder that cannot be read or written, 130 interrupted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import Failed
from pipelines.layout import PARAMS


def main(argv: Sequence[str] | None = None) -> int:
    """Clean the images; raise where a model, an image or a folder cannot be used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, metavar="FOLDER", help="a purifier's model folder")
    which.add_argument(
        "--defense", metavar="NAME", help=f"a defense of {PARAMS}: its model and inference"
    )
    parser.add_argument(
        "--trust-code", action="store_true",
        help="run the code that the folder of an external network holds",
    )  # fmt: skip
    parser.add_argument("images", type=Path, nargs="+", help="image files, or folders of such")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--side-by-side", action="store_true",
        help="also write every image beside its purified one, to DIR/side-by-side",
    )  # fmt: skip
    options = parser.parse_args(argv)
    try:
        # Imports torch.
        from pipelines.commands import _cleaning

        if options.model is not None and not options.trust_code:
            _cleaning.require_no_code(options.model)
        _cleaning.clean(
            options.model, options.defense, options.images, options.out, options.side_by_side
        )
    except KeyboardInterrupt:
        raise Failed(130, f"interrupted; every file in {options.out} is whole") from None
    return 0
