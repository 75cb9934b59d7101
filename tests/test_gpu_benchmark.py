"""`make gpu` runs from end to end without Ray, DVC and MLflow: rehearsed on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from project import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.py"
MISSING = ("ray", "dvc", "mlflow", "sklearn", "rich", "jinja2", "optuna", "scipy")


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which what a machine with a GPU may lack cannot be imported."""
    for name in MISSING:
        (tmp_path / "bare" / name).mkdir(parents=True)
        (tmp_path / "bare" / name / "__init__.py").write_text(
            f"raise ModuleNotFoundError('{name} is not on such a machine', name='{name}')\n"
        )
    return {**os.environ, "PYTHONPATH": str(tmp_path / "bare")}


def test_the_run_is_rehearsed_on_a_cpu(bare: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--cpu", "--small", "--out", tmp_path / "out"],
        env=bare, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert {"device", "torch", "date", "sizes"} < set(found)
    boxes = found["boxes"]
    assert list(boxes) == ["tests", "pgd", "training", "processes", "autoattack"]
    assert not any({"cut", "failed", "left out"} & set(figures) for figures in boxes.values())
    assert boxes["tests"]["tests"] > 5 and boxes["tests"]["skipped"] == 0
    assert boxes["pgd"]["bare loop"]["right"] == boxes["pgd"]["ours, last iterate"]["right"]
    assert boxes["training"]["times the bare loop"][0] > 0
    assert boxes["processes"]["two processes are faster by"] > 0
    for name, figures in boxes.items():
        assert f"{name} [{found['device']}, {found['torch']}, {found['date']}" in done.stdout
        assert name == "tests" or figures["n"] > 0


def test_without_a_gpu_it_says_how_to_rehearse() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=300)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert done.returncode == 2 and "--cpu --small rehearses" in done.stderr


@pytest.fixture
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module
    spec.loader.exec_module(module)
    return module


def test_a_box_that_does_not_fit_its_time_is_cut_and_says_so(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def long(setting: Any, figures: dict[str, Any]) -> None:
        figures["first"] = 1
        try:
            time.sleep(60)
        except Exception:
            raise AssertionError("the end of the time was taken for an error") from None

    def broken(setting: Any, figures: dict[str, Any]) -> None:
        raise RuntimeError("no kernel")

    def quick(setting: Any, figures: dict[str, Any]) -> None:
        figures["n"] = 3

    benchmark.BOXES |= {"long": (long, 0.1), "broken": (broken, 0.2), "quick": (quick, 1.0)}
    setting = benchmark.Setting(torch.device("cpu"), True, tmp_path)
    began = time.monotonic()
    benchmark.run(setting, 5, ["long", "broken", "quick"])
    assert time.monotonic() - began < 4
    boxes = json.loads((tmp_path / "gpu.json").read_text())["boxes"]
    assert boxes["long"]["first"] == 1 and "its time was over" in boxes["long"]["cut"]
    assert boxes["broken"]["failed"] == "RuntimeError: no kernel" and boxes["quick"]["n"] == 3
    assert "long [CPU" in capsys.readouterr().out
