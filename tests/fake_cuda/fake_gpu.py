"""A GPU that is not there: CUDA tensors are torch's fake ones, tensors on the CPU are real.

    with fake_gpu() as gpu:
        model = on_gpu(model)
        step()
    assert gpu.waits == {}

An operation that mixes the two devices raises, and so does ``numpy()`` of a fake tensor. What would make the
CPU wait for the GPU (reading a value, a copy that is not from pinned memory) is counted in ``waits`` by the
place in bidm_cli that does it, and gets ones in place of values.

Torch without a GPU cannot differentiate fake CUDA tensors: the autograd engine asks the driver for the stream
of their device. They are therefore made without ``dispatch_device``: they say "cuda" to Python and "meta" to
the engine, which runs them as it runs CPU tensors. Autocast does not know them then, and is done here.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

GPU = torch.device("cuda", 0)
_make_subclass = torch.Tensor._make_subclass
_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default}
_SIZES_BY_VALUE = {torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default}


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
        self._depth = 0
        self._pinned = WeakIdKeyDictionary()

    def _pin(self, tensor: Tensor) -> Tensor:
        assert tensor.device.type == "cpu", "only memory of the CPU can be pinned"
        pinned = tensor.clone()
        self._pinned[pinned] = True
        return pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == torch.device("meta"):  # of a fake tensor, as C++ sees it
            kwargs["device"] = GPU
        leaves = tree_leaves((args, kwargs))
        fakes = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        if not fakes and not any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves):
            return func(*args, **kwargs)
        if self._depth:  # a decomposition of an operation that has been looked at
            return super().__torch_dispatch__(func, types, args, kwargs)
        done, result = self._waiting(func, args, kwargs, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        if done:
            return result
        self._depth += 1
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._depth -= 1
        self.operations.update(leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _waiting(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> tuple[bool, Any]:
        """(True, stand-in of its result) for an operation that brings values to the CPU, after counting it."""
        target, on_gpu = kwargs.get("device"), [tensor for tensor in tensors if tensor.device.type == "cuda"]
        if on_gpu and func in _READS:
            self._wait()
            return True, 1.0 if on_gpu[0].is_floating_point() else 1
        if on_gpu and target is not None and target.type == "cpu":
            self._wait()
            return True, torch.ones(on_gpu[0].shape, dtype=kwargs.get("dtype") or on_gpu[0].dtype)
        if func is torch.ops.aten.copy_.default and args[0].device.type != args[1].device.type:
            self._wait(args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            return True, args[0].fill_(1) if args[0].device.type == "cpu" else args[0]
        if tensors and not on_gpu:
            self._wait(tensors[0], kwargs.get("non_blocking", False))
        elif self._indexes_by_value(func, args):
            self._wait()
            raise AssertionError(f"the size of {func}'s result depends on values on the GPU")
        return False, None

    @staticmethod
    def _indexes_by_value(func: Any, args: Any) -> bool:
        if func in _SIZES_BY_VALUE:
            return True
        return func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )

    def _wait(self, source: Tensor | None = None, non_blocking: bool = False) -> None:
        """Count a wait, unless it is a copy to the GPU that need not be waited for."""
        if source is not None and non_blocking and source in self._pinned:
            return
        self.waits[_place()] += 1


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Let "cuda" be a device in the block."""
    gpu = FakeGpu()
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (torch.Tensor, "_make_subclass", staticmethod(_without_dispatched_device)),
            (torch.Tensor, "pin_memory", lambda tensor: gpu._pin(tensor)),
            (torch, "Generator", _Generator),
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


def _without_dispatched_device(cls: Any, data: Tensor, *more: Any, **named: Any) -> Tensor:
    if cls is FakeTensor:
        named["dispatch_device"] = False
    return _make_subclass(cls, data, *more, **named)


def _place() -> str:
    """Innermost function of bidm_cli that is being called; the test's, where there is none."""
    frame, fallback = sys._getframe(1), "test"
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "bidm_cli" in path.parts and path.name != "transfer.py":
            within = path.parts[path.parts.index("bidm_cli") + 1 :]
            return f"{'/'.join(within)}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return fallback


_IN_HALF = {
    torch.conv1d, torch.conv2d, torch.conv_transpose2d, torch.nn.functional.linear, torch.matmul, torch.bmm,
    torch.mm, torch.addmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.bmm,
    torch.nn.functional.scaled_dot_product_attention,
}  # fmt: skip
_IN_FLOAT = {
    torch.nn.functional.softmax, torch.softmax, Tensor.softmax, torch.nn.functional.group_norm,
    torch.nn.functional.layer_norm, torch.nn.functional.mse_loss, torch.sum, Tensor.sum, torch.exp, Tensor.exp,
    torch.pow, Tensor.pow, torch.linalg.vector_norm, torch.cumsum, Tensor.cumsum,
}  # fmt: skip
"""Of torch's lists for CUDA (docs: amp, "Op-Specific Behavior"), those that networks call."""


class _Autocast(TorchFunctionMode):
    """Types of operations under ``torch.autocast("cuda")``, for fake tensors that it does not know."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (func in _IN_HALF or func in _IN_FLOAT) and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda") if func in _IN_HALF else torch.float32

            def cast(leaf: Any) -> Any:
                fitting = isinstance(leaf, FakeTensor) and leaf.is_floating_point()
                return leaf.to(dtype) if fitting and leaf.dtype != torch.float64 else leaf

            args, kwargs = tree_map(cast, args), tree_map(cast, kwargs)
        return func(*args, **kwargs)


def on_gpu(model: Any) -> Any:
    """``model`` with all parameters and buffers of its networks on the fake GPU, in place.

    ``Module.to`` cannot exchange a real parameter for a fake one. Tensors that a module keeps besides stay
    on the CPU, as with ``to``.
    """
    for part in (model.unet, model.first_stage, model.conditioner):
        if part is not None:
            _module_on_gpu(part)
    if model.null_context is not None:
        model.null_context = model.null_context.to(GPU)
    return model


def _module_on_gpu(network: nn.Module) -> None:
    for module in network.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fake = torch.empty_like(value, device=GPU)
                module._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty_like(value, device=GPU)


@contextlib.contextmanager
def no_waits(gpu: FakeGpu) -> Iterator[None]:
    """Fail if the block would have waited for the GPU."""
    before = gpu.waits.copy()
    yield
    assert not gpu.waits - before, f"the CPU waits for the GPU in {dict(gpu.waits - before)}"
