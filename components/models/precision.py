"""Full float32: what every reported number is computed in, whatever its caller has switched on.

A number also has to come out twice: where it is computed, cuDNN takes no algorithm that adds in an
order of its own. On an H200 (2026-11-27) such algorithms moved the answers of a descent by Adam by
3e-4 of their length from call to call.

Only a training may compute in less, where its section says so (`Precision`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch.backends import cuda

# Any: the stubs know only some of their settings.
cudnn: Any = torch.backends.cudnn
mkldnn: Any = torch.backends.mkldnn

Precision = Literal["float32", "tf32", "bfloat16"]
# The first NVIDIA GPUs that multiply in TF32 and bfloat16.
AMPERE = (8, 0)

# How float32 is multiplied on CUDA and on the CPU (mkldnn): "ieee", or with factors rounded to TF32
# or bfloat16. The general settings come first: "none" stands for the value of a more general one.
_GENERAL: Sequence[Any] = (torch.backends, cudnn, mkldnn)
_CUDA: Sequence[Any] = (cuda.matmul, cudnn.conv, cudnn.rnn)
_SPECIAL: Sequence[Any] = (*_CUDA, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch off autocast, TF32 and bfloat16 on CUDA and the CPU; at the end restore what was on.

    Equal calls give equal bits where cuDNN has the choice. Also a decorator. What a network
    switches on inside its own `forward` stays on: that is part of the network. The precision of
    products is a setting of the whole process, so two threads must not want different ones at the
    same time.
    """
    with (
        torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False),
        float32_products(tf32=False), _repeatable(),
    ):  # fmt: skip
        yield


@contextmanager
def _repeatable() -> Iterator[None]:
    """Let cuDNN give equal bits for equal calls; at the end restore what was set."""
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Multiply float32 in full or, with `tf32` on CUDA, with factors rounded to TF32.

    At the end what was on before is restored. Autocast is left alone.
    """
    (products, convolutions), newer = _older_settings(), []
    for setting in (*_GENERAL, *_SPECIAL):
        newer.append(setting.fp32_precision)
        # From now on the more special settings show their own value.
        _set(setting, "none")
    _set_older(products and ("high" if tf32 else "highest"), None if convolutions is None else tf32)
    for setting in _SPECIAL:
        _set(setting, "tf32" if tf32 and setting in _CUDA else "ieee")
    try:
        yield
    finally:
        _set_older(products, convolutions)
        for setting, precision in zip((*_GENERAL, *_SPECIAL), newer, strict=True):
            _set(setting, precision)


def require_device(precision: Precision, device: torch.device) -> None:
    """Raise ValueError where a device cannot train in this precision.

    TF32 and bfloat16 need an NVIDIA GPU of compute capability 8.0. A CPU also computes in bfloat16,
    if slowly where it has no units for it.
    """
    if precision == "float32" or (precision == "bfloat16" and device.type == "cpu"):
        return
    if device.type != "cuda":
        raise ValueError(
            f"precision {precision} needs a GPU, and this training runs on the {device.type}: set "
            "precision to float32 or bfloat16, or gpus in resources"
        )
    found = torch.cuda.get_device_capability(device)
    if found < AMPERE:
        raise ValueError(
            f"precision {precision} needs a GPU of compute capability 8.0 or more, and this one "
            f"has {found[0]}.{found[1]}: set precision to float32"
        )


def _set(setting: Any, precision: str) -> None:
    if setting is mkldnn:
        # Its attribute, as of torch 2.13, sets that of torch.backends.
        mkldnn.set_flags(_fp32_precision=precision)
    else:
        setting.fp32_precision = precision


def _older_settings() -> tuple[str | None, bool | None]:
    """Return the settings from before torch 2.9, of products of matrices and of convolutions.

    They only mirror the newer ones. But torch reads them when it compiles, and refuses to where the
    two contradict each other, so both are changed. None: they do already, and are left alone.
    """
    products, convolutions = None, None
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = cudnn.allow_tf32
    return products, convolutions


def _set_older(products: str | None, convolutions: bool | None) -> None:
    if products is not None:
        torch.set_float32_matmul_precision(products)
    if convolutions is not None:
        cudnn.allow_tf32 = convolutions
