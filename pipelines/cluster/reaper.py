"""Ends the processes that an embedded Ray leaves behind when its stage is killed.

`session` starts this process first. When a stage is killed, the kernel ends the processes that the
stage itself started for Ray, but not what those started in turn: agents and workers, which look for
the lost Ray for a minute. They are recognised by the log files they write, in a folder that Ray
names after the starting time and the process id of the stage.
"""

import os
import re
import sys
import time
from contextlib import suppress

import psutil

POLL_S = 0.5
# The pauses after each of several rounds: a process that was just starting may have no log yet.
PAUSES_S = (0.5, 0.5, 1.0, 2.0)


def main() -> None:
    """Wait until a stage is dead, whose process id and starting time are given, and clean up."""
    stage, since = sys.argv[1:]
    while os.getppid() == int(stage):
        time.sleep(POLL_S)
    for pause in PAUSES_S:
        for process in _left_behind(stage, since):
            with suppress(psutil.Error):
                process.kill()
        time.sleep(pause)


def _left_behind(stage: str, since: str) -> list[psutil.Process]:
    """Return the processes that write to the folder of a Ray that the stage has started.

    An older Ray, which may be in use, may come from a process with the same id: hence `since`.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            # A process that only reads may be a person's.
            written = "\n".join(file.path for file in process.open_files() if file.mode != "r")
            names = re.findall(rf"/(session_[\d_-]+_{stage})/", written)
            if any(name > since for name in names):
                found.append(process)
    return found


if __name__ == "__main__":
    main()
