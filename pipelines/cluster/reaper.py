"""Ends what an embedded Ray leaves when its stage is killed: a process that `session` starts first.

With a stage the kernel ends what the stage itself started of Ray, and not what that started in its
turn: agents and workers, which look for a minute for the Ray that is gone. They are known by their
logs, in the folder that Ray names after the time and the process it was started at and by.
"""

import os
import re
import sys
import time
from contextlib import suppress

import psutil

LOOK_S = 0.5
# How long it looks on after each look, since what was just starting may have no log yet.
AFTER_S = (0.5, 0.5, 1.0, 2.0)


def main() -> None:
    """Wait for the death of a stage, whose number and first moment are given, and clean up."""
    stage, since = sys.argv[1:]
    while os.getppid() == int(stage):
        time.sleep(LOOK_S)
    for pause in AFTER_S:
        for process in _left(stage, since):
            with suppress(psutil.Error):
                process.kill()
        time.sleep(pause)


def _left(stage: str, since: str) -> list[psutil.Process]:
    """Return what writes to a folder of a Ray that this process started, no earlier than this.

    The starter of an older one, which may be in use, may have had the same number.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            # Who only reads may be a person.
            written = "\n".join(file.path for file in process.open_files() if file.mode != "r")
            names = re.findall(rf"/(session_[\d_-]+_{stage})/", written)
            if any(name > since for name in names):
                found.append(process)
    return found


if __name__ == "__main__":
    main()
