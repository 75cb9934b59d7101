"""What idle OpenMP threads cost: two processes with two threads each, on two cores.

    python benchmarks/threads.py

By default idle OpenMP threads spin, and two such processes on two cores slow each other down. With
`OMP_WAIT_POLICY=passive`, which importing `pipelines` sets, they sleep. Prints for each setting the
images per second of two processes that run side by side (forward and backward of a small ResNet).
"""

import os
import subprocess
import sys

WORK = """
import sys, time, torch
from components.models.classifiers import ResNet
torch.set_num_threads(int(sys.argv[1]))
net = ResNet(kind="resnet", depth=20, width=16).build((3, 32, 32), 10)
x, done, end = torch.rand(64, 3, 32, 32), 0, time.monotonic() + float(sys.argv[2])
while time.monotonic() < end:
    net(x).sum().backward()
    done += len(x)
print(done / float(sys.argv[2]))
"""


def measure(threads: int, policy: str, seconds: float = 10) -> list[float]:
    """Return images per second of two processes that run at the same time."""
    environment = {**os.environ, "OMP_WAIT_POLICY": policy, "PYTHONPATH": os.getcwd()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(threads), str(seconds)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    return [float(process.communicate()[0]) for process in processes]


if __name__ == "__main__":
    for threads, policy in ((2, "active"), (2, "passive"), (1, "passive")):
        first, second = measure(threads, policy)
        print(f"2 processes x {threads} threads, {policy:7}: {first:6.0f} + {second:6.0f} images/s")
