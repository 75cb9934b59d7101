"""Full float32: what every reported number is computed in, whatever its caller has switched on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.backends import cuda

# Any: the stubs know only some of their settings.
cudnn: Any = torch.backends.cudnn
mkldnn: Any = torch.backends.mkldnn

# How float32 is multiplied on CUDA and on the CPU (mkldnn): "ieee", or with factors rounded to TF32
# or bfloat16. The general settings come first: "none" stands for the value of a more general one.
_GENERAL: Sequence[Any] = (torch.backends, cudnn, mkldnn)
_SPECIAL: Sequence[Any] = (
    cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn,
)  # fmt: skip


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch off autocast, TF32 and bfloat16 on CUDA and the CPU; at the end restore what was on.

    Also a decorator. What a network switches on inside its own `forward` stays on: that is part of
    the network. The precision of products is a setting of the whole process, so two threads must
    not want different ones at the same time.
    """
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        (products, convolutions), newer = _older_settings(), []
        for setting in (*_GENERAL, *_SPECIAL):
            newer.append(setting.fp32_precision)
            # From now on the more special settings show their own value.
            _set(setting, "none")
        _set_older(products and "highest", convolutions and False)
        for setting in _SPECIAL:
            _set(setting, "ieee")
        try:
            yield
        finally:
            _set_older(products, convolutions)
            for setting, precision in zip((*_GENERAL, *_SPECIAL), newer, strict=True):
                _set(setting, precision)


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
