"""A GPU without memory ends in a sentence that says what to lower. There is none: it is raised."""

import os
from pathlib import Path

import pytest
import torch

from pipelines.cluster import trainer, worker_pool
from pipelines.config.resources import TrainingWorkers, Workers


def test_a_gpu_without_memory_ends_in_a_sentence_that_says_what_to_lower(tmp_path: Path) -> None:
    before = os.environ.get("RAY_AUTH_TOKEN")

    def full(device: str) -> trainer.TrainingTask:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    train = TrainingWorkers(workers=0, cpus=1, gpus=0)
    for count in (0, 1):
        workers = Workers(workers=count, cpus=1, gpus=0)
        with pytest.raises(MemoryError, match="lower batch_size of the training, or batch"):
            worker_pool.map_shards(full, [{}], workers, lambda *_: None, print)
    with pytest.raises(MemoryError, match="lower batch_size of the training, or batch"):
        trainer.train(full, {}, tmp_path / "out", tmp_path / "work", train, lambda *_: None, print)
    assert not (tmp_path / "out").exists()
    # Nor has the Ray of this process left its token in the environment.
    assert os.environ.get("RAY_AUTH_TOKEN") == before
