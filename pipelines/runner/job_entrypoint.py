"""Begins a job whose stage maps: `python -m pipelines.runner.job_entrypoint SHARE ATTEMPT`.

Workers take seconds to come: they are sent for first, and come while this process imports torch and
all else that `launch` needs.
"""

import os
import sys
from contextlib import suppress

from pipelines.cluster import capacity, session, worker_pool
from pipelines.config.resources import Workers
from pipelines.storage import jobs


def main() -> None:
    """Send for all workers of a share, and do the job."""
    share = Workers.model_validate_json(sys.argv.pop(1))
    # What does not work here is said by the stage, which tries it again.
    with suppress(Exception), session.quiet():
        # Where two nodes are one machine, Ray may lay the folder of the code down anew, and who
        # stands in it stands nowhere.
        os.chdir(jobs.scratch())
        session.join_ahead()
        # A cluster that grows as it is asked is asked for what there is to do alone.
        if capacity.AUTOSCALES not in os.environ:
            workers = worker_pool.of(share)
            workers.hire(workers.size)
    from pipelines.runner import job

    job.main()


if __name__ == "__main__":
    main()
