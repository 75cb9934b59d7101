"""The 1,797 digits of 8 x 8 pixels that come with scikit-learn: real data without a download."""

from pathlib import Path
from typing import Literal

import numpy as np

from components.sources.raw import Progress, RawData, SourceConfig, complete, silent


class Digits(SourceConfig):
    """Scikit-learn's digits (Alpaydin and Kaynak, UCI 1998): one grey channel, no test split."""

    kind: Literal["digits"]

    def load(self, scratch: Path, progress: Progress = silent) -> RawData:
        """Return the digits with their 17 levels of grey (0..16) spread over 0..255."""
        # Imported here, because scikit-learn takes a second that other sources need not wait for.
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images = np.rint(bunch.images * 255 / 16).astype(np.uint8)[:, np.newaxis]
        names = tuple(str(digit) for digit in bunch.target_names)
        return RawData(complete(images, bunch.target.astype(np.int64)), None, names)
