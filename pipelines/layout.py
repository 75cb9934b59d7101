"""Where everything lies: what options of stages are where a command does not say otherwise."""

from pathlib import Path

ROOT = Path(".limpid")

PATHS = {
    "train": "data/train",
    "val": "data/val",
    "test": "data/test",
    "classifier": "models/standard",
    "pool": "pool",
    "models": "models",
    "adversarial": "adversarial",
    "selftest": "reports/selftest.json",
    "out_train": "data/train",
    "out_val": "data/val",
    "out_test": "data/test",
    "out_metrics": "reports/metrics.json",
    "out_headlines": "reports/headlines",
    "out_scores": "reports/scores.parquet",
    "out_plots": "reports/plots",
    "out_report": "reports/report.html",
}
MODEL, SETS = "models/{name}", "adversarial/{name}"
OUTS = {
    "train_classifier": MODEL,
    "train_purifier": MODEL,
    "distill_purifier": MODEL,
    "finetune_atop": MODEL,
    "craft_training_set": "pool",
    "generate_baseline": SETS,
    "generate_adversarial": SETS,
    "generate_controls": "adversarial/controls",
    "tune": "reports/tuning/{name}",
}


def default(stage: str, option: str) -> str | None:
    """Return where a stage reads or writes what this option names; None where only it can say."""
    return OUTS.get(stage) if option == "out" else PATHS.get(option)
