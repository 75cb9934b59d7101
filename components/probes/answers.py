"""Checks of answers: finite and varied, random only if declared, and the same to everybody."""

import ast
import sys
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from components.data.draws import Draws
from components.models.defense import Defense
from components.models.identity import modules_of, sources
from components.probes.bench import Bench, rough
from components.probes.contract import Finding, not_asked

# Logits further apart than this fraction of their norm are different; AutoAttack's rule.
TOLERANCE = 1e-4
REPEATS = 5
BATCH_SIZES = (1, 7, 128)
# Answers to the same question differ by less than this fraction of the length of the logits.
SAME = 1e-3
# The last bit may make another label, on so many images.
ROUGH = 0.02
# Names by which code finds out where it runs; the last part of a dotted name. With (), calls alone.
SIGNS = {
    "inspect", "_getframe", "currentframe", "f_back", "is_grad_enabled",
    "is_inference_mode_enabled", "environ", "getenv", "getpid", "argv", "socket", "subprocess",
    "settrace", "setprofile", "gc", "weakref", "Draws()", "write_bytes", "write_text",
    "tofile", "memmap", "mmap", "shelve", "tempfile", "perf_counter", "monotonic", "time_ns",
}  # fmt: skip
# Our own use, by module: checkpointed descents save memory where no gradient is asked for, and
# dropout and the scoring make draws.
ALLOWED = {
    "components.models.purifiers.descent": {"is_grad_enabled"},
    "components.models.purifiers.diffusion.diffdefense": {"is_grad_enabled"},
    "components.models.defense": {"is_grad_enabled"},
    "components.models.classifiers": {"Draws()"},
    "components.models.accuracy": {"Draws()"},
}


def logits_sound(logits: Tensor) -> Finding:
    """Check 5: logits (N,K) are finite, not softmaxed, and not the same for every image."""
    finite = bool(logits.isfinite().all())
    sums = logits.sum(1)
    softmax = finite and bool(
        ((logits >= 0) & (logits <= 1)).all() and (sums - 1).abs().max() < 1e-4
    )
    constant = finite and len(logits) > 1 and bool(logits.std(0).max() < 1e-6)
    faults = [("not finite", not finite), ("already softmaxed", softmax), ("constant", constant)]
    found = [name for name, present in faults if present]
    detail = f"logits of {len(logits)} images are " + (", ".join(found) or "finite and varied")
    return Finding(name="logits", level="block", passed=not found, detail=detail)


def check_logits(defense: Defense, x: Tensor, draws: Draws) -> list[Finding]:
    """Checks 5 and 11 on pixels (N,C,H,W)."""
    with torch.no_grad():
        logits = [defense(x, draws.redraw(draw)) for draw in range(REPEATS)]
    spread = max(float(_apart(one, logits[0]).max()) for one in logits)
    random = spread > TOLERANCE
    declared = "stochastic" if defense.stochastic else "deterministic"
    detail = f"declared {declared}; {REPEATS} answers differ by {spread:.1e} of their length"
    return [
        logits_sound(logits[0]),
        Finding(
            name="randomness_declared",
            level="block",
            passed=random == defense.stochastic,
            detail=detail,
        ),
    ]


def one_answer(bench: Bench, points: Mapping[str, Tensor]) -> Finding:
    """Check 33: a point gets one answer, however the defense is asked.

    With gradients on and off, in batches of 1, 7, 128 and the batch of the scoring, asked again,
    without draws if it is deterministic: the logits differ by at most 1e-3 of their length, unless
    the purifier descends or rounds, and at most 2 % of the labels change, whatever the length: a
    large constant in the logits would hide any difference. The float64 and the folded copy may
    change 2 % of the labels, too, or differ by what rounding alone does: that is measured by moving
    every pixel by 1e-7.

    Where one seed serves the noise of a whole batch (`Defense.batchwise`), other batches
    have other noise: they are left out, and if nothing else differs the check was not asked.
    """
    differing = []
    batchwise = bench.defense.batchwise
    worst, where = 0.0, "none"
    for name, x in points.items():
        with torch.no_grad():
            base = bench.defense(x, bench.draws)
            moved = bench.defense((x + 1e-7).clamp(0, 1), bench.draws)
        floor = 10 * _apart(moved, base)
        for way, rows, answer in _ways(bench, x, batchwise):
            loose = way in ("float64", "folded")
            apart = _apart(answer, base[rows])
            labels = float((answer.argmax(1) != base[rows].argmax(1)).double().mean())
            if loose:
                same = labels <= ROUGH or bool((apart <= floor[rows]).all())
            else:
                same = labels <= ROUGH and (rough(bench.defense) or bool((apart <= SAME).all()))
            if not same:
                differing.append(f"{way} at {name}")
            if float(apart.max()) > worst and not loose:
                worst, where = float(apart.max()), f"{way} at {name}"
    if batchwise and not differing:
        return not_asked("one_answer", "the noise of an image depends on the batch that it is in")
    return Finding(
        name="one_answer",
        level="block",
        passed=not differing,
        detail=f"answers differ by at most {worst:.1e} of their length ({where}); too far: "
        f"{', '.join(differing) or 'none'}",
    )


def _ways(bench: Bench, x: Tensor, batchwise: bool) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield ways to ask about `x` (N,C,H,W): a name, the rows asked about, their logits.

    If the noise is `batchwise`, in the batch `x` alone.
    """
    defense, draws = bench.defense, bench.draws
    every = torch.arange(len(x), device=x.device)
    with torch.enable_grad():
        yield "gradients on", every, defense(x.clone().requires_grad_(), draws).detach()
    with torch.no_grad():
        yield "asked again", every, defense(x, draws)
        for size in () if batchwise else sorted({*BATCH_SIZES, bench.batch}):
            # A batch larger than the images there are holds some of them several times.
            rows = torch.arange(size, device=x.device) % len(x)
            yield f"a batch of {size}", rows, defense(x[rows], draws[rows])
        if not defense.stochastic:
            yield "no draws", every, defense(x, None)
        yield "folded", every, bench.folded(x, draws)
        exact = bench.precise
        dtype = next(exact.parameters()).dtype
        yield "float64", every, exact(x.to(dtype), draws).float()


def looks_around(defense: Defense) -> Finding:
    """Check 34: the code of a defense does not ask where it runs.

    Names that serve to find out are looked for in all files that the defense is made of. Code that
    needs them for good reasons is named as well: it is a warning, for people to read.
    """
    modules = modules_of(defense)
    found = []
    for name, path in sorted(sources(modules).items()):
        # The harness itself may look where it likes; the models may not, whoever wrote them.
        if name.startswith("components.") and not name.startswith(("components.models.", *modules)):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {sign for sign in _names(tree) if sign in SIGNS} - ALLOWED.get(name, set())
        if used:
            found.append(f"{name} ({', '.join(sorted(used))})")
    unread = sorted(m for m in modules if m not in sys.modules or not _readable(m))
    if unread:
        found.append(f"no source: {', '.join(unread)}")
    return Finding(
        name="looks_around",
        level="warn",
        passed=not found,
        detail="code that asks where it runs: " + ("; ".join(found) or "none"),
    )


def _readable(module: str) -> bool:
    """Say whether a module has a file; those of libraries are taken as they are."""
    return bool(getattr(sys.modules[module], "__file__", None))


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield f"{node.func.id}()"
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            base = getattr(node, "module", None) or ""
            yield from base.split(".")
            for alias in node.names:
                yield from alias.name.split(".")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # As in getattr(torch, "is_grad_enabled").
            yield node.value


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """Return the distances between rows of logits (N,K), as fractions of the norm of the second."""
    norms = other.norm(dim=1).clamp_min(1e-12)
    apart: Tensor = (one - other).norm(dim=1) / norms
    return apart
