"""What a GPU does with Limpid, in one run of at most 480 s: `make gpu`.

    python benchmarks/gpu.py [--out FOLDER] [--seconds 480] [--cpu] [--small]

Five boxes, each with a part of the time; what one leaves, the next may use. A box that does not fit
is cut, keeps the figures it has, and says so. The figures are in FOLDER/gpu.json, written after
every box, with the card, the version of torch, the date and n.

    tests       the tests that are marked `gpu`; their figures, such as peak memory, are kept
    pgd         PGD-20 beside a bare loop and torchattacks
    training    an epoch of `fit` beside a bare loop, and in TF32 and bfloat16
    processes   shards crafted by one process and by two on the same GPU, by the pipeline's function
    autoattack  AutoAttack beside that of torchattacks with 100 steps

It needs torch, numpy, pydantic, pyarrow, safetensors and pytest; torchattacks, and what the
pipeline needs besides, are used where they are installed. All attacks run in full float32 on a
ResNet-18 that was trained for seconds on synthetic images. `--cpu --small` rehearses all of it.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
# Neither is installed on such a machine, nor the tests anywhere.
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from gpu_boxes import BOXES, Figures, Setting  # noqa: E402


class OutOfTime(BaseException):
    """The time of a box is over; no handler of exceptions inside it is to catch this."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in what runs inside, once so many seconds have passed."""

    def end(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(setting: Setting, seconds: float, boxes: list[str]) -> dict[str, Figures]:
    """Run the boxes one after another; a failure or the end of its time ends a box, not the run."""
    began, found = time.monotonic(), dict[str, Figures]()
    about = {
        "device": card(setting.device), "torch": torch.__version__, "date": str(date.today()),
        "sizes": "small" if setting.small else "whole",
    }  # fmt: skip
    setting.out.mkdir(parents=True, exist_ok=True)
    for name in boxes:
        work, part = BOXES[name]
        found[name] = figures = {}
        here = time.monotonic()
        try:
            with limited(part * seconds - (here - began)):
                work(setting, figures)
        except OutOfTime:
            figures["cut"] = f"its time was over after {time.monotonic() - here:.0f} s"
        except Exception as error:
            figures["failed"] = f"{type(error).__name__}: {error}"
        figures["seconds of the box"] = round(time.monotonic() - here, 1)
        text = json.dumps({**about, "boxes": found}, indent=2, default=str)
        (setting.out / "gpu.json").write_text(text + "\n")
        shown = ", ".join(f"{key}: {value}" for key, value in figures.items())
        print(f"{name} [{', '.join(str(one) for one in about.values())}] {shown}", flush=True)
    return found


def card(device: torch.device) -> str:
    """Return the name of the device."""
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / ".limpid" / "gpu")
    parser.add_argument("--seconds", type=float, default=480, help="the limit of the whole run")
    parser.add_argument("--cpu", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--small", action="store_true", help="sizes for a rehearsal")
    parser.add_argument("--boxes", nargs="+", choices=BOXES, default=list(BOXES))
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --cpu --small rehearses the run on the CPU")
    if options.cpu:
        torch.set_num_threads(1)
    device = torch.device("cpu" if options.cpu else "cuda")
    found = run(Setting(device, options.small, options.out), options.seconds, options.boxes)
    return 1 if any("failed" in figures for figures in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
