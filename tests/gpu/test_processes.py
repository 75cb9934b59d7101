"""Two processes on one GPU craft what one does, by the pipeline's own function."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from synthetic import SHAPE, THREAT, images, pgd
from torch import nn

from components.attacks.sets import read_crafted, write_crafted_manifest
from components.data import image_set
from components.data.shards import shard_name
from components.models.checkpoints import ModelCard, save
from components.models.classifiers import SmallCnn

pytestmark = pytest.mark.gpu
for module in ("PIL", "ruamel.yaml"):
    pytest.importorskip(module, reason=f"the pipeline needs {module}")
SHARDS = 2


def craft_one(shard: int, spec: Any, folder: str, device: str, peaks: Any) -> None:
    """Craft one shard, as a worker of the pipeline does; note the peak of memory in MiB."""
    from pipelines.tasks.crafting import craft_shard

    craft_shard(spec, shard, Path(folder) / shard_name(shard), device)
    peaks[shard] = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0.0


@pytest.fixture
def spec(network: nn.Module, count: int, tmp_path: Path) -> Any:
    """A set to craft on two shards of images."""
    from pipelines.tasks.crafting import SetSpec
    from pipelines.tasks.subject import Subject

    data = images(SHARDS * count, SHAPE, seed=4)
    image_set.write(tmp_path / "images", data, count)
    card = ModelCard(
        format=1, family="classifier", provenance={}, shape=list(SHAPE),
        model=SmallCnn(kind="small_cnn", width=8).model_dump(), class_names=list(data.class_names),
    )  # fmt: skip
    save(tmp_path / "model", network, card)
    return SetSpec(
        Subject(tmp_path / "model"), "full", pgd(), tmp_path / "images", THREAT, 0, 250,
        tmp_path / "out",
    )  # fmt: skip


def test_two_processes_on_one_gpu_craft_what_one_does(
    spec: Any, gpu: torch.device, tmp_path: Path, record_property: Any
) -> None:
    context, sets = mp.get_context("spawn"), []
    with context.Manager() as manager:
        peaks = manager.list([0.0] * SHARDS)
        calls = {
            name: [(shard, spec, str(tmp_path / name), gpu.type, peaks) for shard in range(SHARDS)]
            for name in ("one", "two")
        }
        for call in calls["one"]:
            craft_one(*call)
        processes = [context.Process(target=craft_one, args=call) for call in calls["two"]]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode == 0
        record_property("MiB at the peak of a process that crafts", max(peaks))
    for name in calls:
        write_crafted_manifest(tmp_path / name, SHAPE, {})
        sets.append(read_crafted(tmp_path / name))
    one, other = sets
    assert torch.equal(one.ids, other.ids) and 0 < int(one.success.sum()) < len(one.success)
    assert torch.equal(one.success, other.success)
    assert torch.allclose(one.images, other.images, atol=1e-6)
