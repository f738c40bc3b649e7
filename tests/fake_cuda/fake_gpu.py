"""A GPU that is not there: CUDA tensors are torch's fake ones, tensors on the CPU are real.

    with fake_gpu() as gpu:
        model = model.to("cuda")
        with gpu.no_waits():
            step()

An operation that mixes the two devices raises, and so does ``numpy()`` of a fake tensor. What would make the
CPU wait for the GPU (reading a value, a copy that is not from pinned memory) is counted in ``waits`` by the
place in bidm_cli that does it, and gets ones in place of values; in a ``no_waits`` block it raises GpuWait.

Torch without a GPU cannot differentiate fake CUDA tensors: the autograd engine asks the driver for the stream
of their device. They are therefore made without ``dispatch_device``: they say "cuda" to Python and "meta" to
the engine, which runs them as it runs CPU tensors. Autocast does not know them then, and is done here by the
lists of operations in torch's own header.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

# Imported before anything is patched: it compares signatures as it is imported.
import torch._dynamo
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

GPU = torch.device("cuda", 0)
_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense.default, _aten.item.default, _aten.equal.default}
_SIZES_BY_VALUE = {_aten.nonzero.default, _aten.masked_select.default, _aten._unique2.default}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_make_subclass = torch.Tensor._make_subclass


class GpuWait(AssertionError):
    """The CPU would wait for the GPU where it must not."""


class FakeGpu(FakeTensorMode):
    """Mode in which "cuda" is a device whose tensors have no values.

    Attributes:
        waits: times that the CPU would have waited for the GPU, by place ("distill/trainer.py:_log").
        operations: number of operations on the GPU, by the type of their result.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: Counter[str] = Counter()
        self.operations: Counter[torch.dtype] = Counter()
        self._forbidden, self._nested = False, False
        self._pinned = WeakIdKeyDictionary()

    @contextlib.contextmanager
    def no_waits(self) -> Iterator[None]:
        """Raise GpuWait where the CPU would wait in the block."""
        self._forbidden = True
        try:
            yield
        finally:
            self._forbidden = False

    def wait(self, what: object = "synchronize") -> None:
        """Count a wait at the place that is being run."""
        self.waits[place := _place()] += 1
        if self._forbidden:
            raise GpuWait(f"{place} waits for the GPU: {what}")

    def pin(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` in pinned memory."""
        assert tensor.device.type == "cpu", "only memory of the CPU can be pinned"
        self._pinned[pinned := tensor.clone()] = True
        return pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == torch.device("meta"):  # of a fake tensor, as C++ sees it
            kwargs["device"] = GPU
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(leaf, FakeTensor) or _is_gpu(leaf) for leaf in leaves):
            return func(*args, **kwargs)
        if self._nested:  # part of an operation that has been looked at
            return super().__torch_dispatch__(func, types, args, kwargs)
        stand_in = self._waiting(func, args, kwargs, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        if stand_in is not None:
            return stand_in
        self._nested = True
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._nested = False
        self.operations.update(leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _waiting(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Count the wait that an operation means; stand-in of the values it brings to the CPU, else None."""
        on_gpu = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        unpinned = [t for t in tensors if t.device.type == "cpu" and t.dim() and t not in self._pinned]
        blocking = not kwargs.get("non_blocking", False)
        if on_gpu and func in _READS:
            self.wait(func)
            return 1.0 if on_gpu[0].is_floating_point() and func is not _aten.equal.default else 1
        if on_gpu and "device" in kwargs and kwargs["device"].type == "cpu":
            self.wait(func)
            return torch.ones(on_gpu[0].shape, dtype=kwargs.get("dtype") or on_gpu[0].dtype)
        if func is _aten.copy_.default and _is_gpu(args[0].device) != _is_gpu(args[1].device):
            non_blocking = args[2] if len(args) > 2 else not blocking
            if not (non_blocking and args[1] in self._pinned):
                self.wait(func)
            return args[0] if _is_gpu(args[0].device) else args[0].fill_(1)
        by_value = func is _aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if (tensors and not on_gpu and (blocking or unpinned)) or (func in _INDEXING and unpinned):
            self.wait(func)
        elif func in _SIZES_BY_VALUE or by_value:
            self.wait(func)
            raise AssertionError(f"the size of {func}'s result depends on values on the GPU")
        return None


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Let "cuda" be a device in the block, to which ``Module.to`` brings parameters."""
    gpu = FakeGpu()
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        # A real parameter cannot become a fake one in place.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwritten)
        for target, name, value in (
            (torch.Tensor, "_make_subclass", staticmethod(_without_dispatched_device)),
            (torch.Tensor, "pin_memory", lambda tensor: gpu.pin(tensor)),
            (torch, "Generator", _Generator),
            (torch.cuda, "synchronize", lambda device=None: gpu.wait()),
            (torch.cuda, "is_bf16_supported", lambda *options, **more: True),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        ):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(gpu)
        stack.enter_context(_Autocast())
        yield gpu


class _Generator(torch.Generator):
    """Generator that is on the CPU in place of the GPU: fake tensors draw nothing."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")


def _is_gpu(leaf: Any) -> bool:
    return isinstance(leaf, torch.device) and leaf.type == "cuda"


def _without_dispatched_device(cls: Any, data: Tensor, *more: Any, **named: Any) -> Tensor:
    if cls is FakeTensor:
        named["dispatch_device"] = False
    return _make_subclass(cls, data, *more, **named)


def _place() -> str:
    """Innermost function of bidm_cli that is being called; "test" where there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "bidm_cli" in path.parts and path.name != "transfer.py":
            within = path.parts[path.parts.index("bidm_cli") + 1 :]
            return f"{'/'.join(within)}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "test"


def _autocast_list(*macros: str) -> set[str]:
    """Operations in lists of torch's autocast_mode.h, as Python names them."""
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text(encoding="utf-8")
    bodies = [re.search(rf"#define {macro}\(_\)((?:.*\\\n)*.*)", header) for macro in macros]
    return {name for body in bodies if body for name in re.findall(r"_\((\w+)", body[1])}


_IN_HALF = _autocast_list("AT_FORALL_LOWER_PRECISION_FP")
_IN_FLOAT = {*_autocast_list("AT_FORALL_FP32", "AT_FORALL_FP32_SET_OPT_DTYPE"), "interpolate"}
"""``interpolate`` is upsample_nearest2d and the like in C++."""


class _Autocast(TorchFunctionMode):
    """Types of operations under ``torch.autocast("cuda")``, for fake tensors that it does not know."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cuda"):
            name = getattr(func, "__name__", "")
            name = name[2:-2] if name.startswith("__") and name.endswith("__") else name
            if name in _IN_HALF or name in _IN_FLOAT:
                dtype = torch.get_autocast_dtype("cuda") if name in _IN_HALF else torch.float32
                args, kwargs = tree_map(_to(dtype), args), tree_map(_to(dtype), kwargs)
        return func(*args, **kwargs)


def _to(dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        fitting = isinstance(leaf, FakeTensor) and leaf.is_floating_point() and leaf.dtype != torch.float64
        return leaf.to(dtype) if fitting else leaf

    return cast
