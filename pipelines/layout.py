"""All paths of a project, in one table.

The options of a stage default to it, and a test compares it with the deps and outs in dvc.yaml.
`{name}` is the instance of a stage that dvc.yaml repeats (`foreach`). An option that is missing
here has no default: only the command line can say which model is meant.
"""

from pathlib import Path

# Where the packages of Limpid lie.
SOURCES = Path(__file__).parent.parent
ROOT = Path(".limpid")
# Locks of running stages, work in progress that a stage continues, events that wait for MLflow.
RUNNING, WORK, SPOOL = ROOT / "running", ROOT / "work", ROOT / "spool"
# Shards that were crafted, and files that were downloaded, before.
CRAFTED, DOWNLOADS = ROOT / "sets", ROOT / "downloads"
LAST_ERROR = ROOT / "last_error.txt"
MLFLOW_DB = Path("mlflow.db")
PARAMS, CODE = Path("params.yaml"), Path("code.yaml")
DVC_YAML, DVC_LOCK = Path("dvc.yaml"), Path("dvc.lock")
# What a project is made from: where the wheel has it, else at the root of the checkout.
_WHEEL = Path(__file__).parent / "templates"
TEMPLATES = _WHEEL if _WHEEL.is_dir() else SOURCES
PROFILES = TEMPLATES / "profiles"
MODELS = Path("models")
METRICS, REPORT = Path("reports/metrics.json"), Path("reports/report.html")
PICTURES = Path("reports/plots/pictures")
TIMINGS = Path("reports/timings.json")
REJECTS = Path("reports/rejects.csv")

TRAIN, VAL, TEST = "data/train", "data/val", "data/test"
STANDARD, POOL, MODEL, SETS = "models/standard", "pool", "models/{name}", "adversarial/{name}"
LADDERS = "ladders"
CRAFTING = {"ladder": f"{LADDERS}/{{name}}.json", "val": VAL, "test": TEST, "out": SETS}
LEARNING = {"train": TRAIN, "val": VAL, "classifier": STANDARD, "pool": POOL, "out": MODEL}

# The options of every stage, in the order of dvc.yaml.
STAGES: dict[str, dict[str, str]] = {
    "prepare_data": {"out_train": TRAIN, "out_val": VAL, "out_test": TEST},
    "import_model": {"val": VAL, "out": MODEL},
    "train_classifier": {"train": TRAIN, "val": VAL, "out": MODEL},
    "craft_training_set": {"train": TRAIN, "classifier": STANDARD, "out": POOL},
    "train_purifier": LEARNING,
    "distill_purifier": LEARNING,
    "finetune_atop": LEARNING,
    "resolve_ladders": {"out": LADDERS},
    "generate_baseline": CRAFTING,
    "generate_adversarial": CRAFTING,
    "generate_controls": CRAFTING,
    "selftest": {"out": "reports/selftest.json"},
    "tune": {
        "train": TRAIN, "val": VAL, "models": str(MODELS), "pool": POOL,
        "out": "reports/tuning/{name}",
    },
    "evaluate": {
        "train": TRAIN, "val": VAL, "test": TEST, "models": str(MODELS), "ladders": LADDERS,
        "adversarial": "adversarial", "selftest": "reports/selftest.json",
        "out_metrics": str(METRICS), "out_headlines": "reports/headlines",
        "out_scores": "reports/scores.parquet", "out_plots": "reports/plots",
        "out_report": str(REPORT),
    },
    "verdict": {"metrics": str(METRICS)},
}  # fmt: skip
