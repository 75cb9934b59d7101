"""Begins a job whose stage maps: `python -m pipelines.ahead SHARE ATTEMPT`.

Workers take seconds to come: they are sent for first, and come while this process imports torch and
all else that `launch` needs.
"""

import os
import sys
from contextlib import suppress

from pipelines import crew, place, session
from pipelines.resources import Share


def main() -> None:
    """Send for all workers of a share, and do the job."""
    share = Share.model_validate_json(sys.argv.pop(1))
    # Joining, Ray lays the folder of the code down anew, and who stands in it stands nowhere.
    os.chdir(place.scratch())
    # What does not work here is said by the stage, which tries it again.
    with suppress(Exception), session.quiet():
        session.join()
        workers = crew.of(share)
        workers.hire(workers.size)
    from pipelines import launch

    launch.main()


if __name__ == "__main__":
    main()
