"""Restricted unpickler for all pickle protocols: it calls nothing but what rebuilds tensors, and stubs.

torch's own restricted unpickler has the instructions of protocol 2 alone; files saved with
``torch.save(..., pickle_protocol=4)`` have others (pytorch/pytorch#118092). This module is what
``torch.load(pickle_module=...)`` takes, a module with ``Unpickler`` and ``load``. Every name goes through
:func:`bidm_cli.checkpoints.reading.pickle_names.stub_for`; the instructions that call, set attributes or fill
containers check what they work on, as torch's do.
"""

from __future__ import annotations

import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import IO, Any, ClassVar

import torch

from bidm_cli.checkpoints.reading.pickle_names import Stub, modern_name, refused, stub_for

TORCHS_INSTRUCTIONS = {
    "PROTO", "STOP", "GLOBAL", "NEWOBJ", "REDUCE", "BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS",
    "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE",
    "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE",
    "SHORT_BINSTRING", "BINPERSID", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "LONG1",
}  # fmt: skip
"""Instructions that torch's restricted unpickler has (torch/_weights_only_unpickler.py)."""


def _encode(text: str, encoding: str) -> bytes:
    """Bytes as protocol 2 has them; other codecs may do anything."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes are encoded in {encoding!r}")
    return text.encode("latin-1")


def _bytearray(content: str | bytes = b"", encoding: str = "latin-1") -> bytearray:
    """A bytearray of what the file holds, never of a size that it names."""
    return bytearray(_encode(content, encoding) if isinstance(content, str) else bytes(memoryview(content)))


_CALLABLE: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
    "_codecs.encode": _encode,
    "builtins.bytearray": _bytearray,
    "builtins.set": set,
    "builtins.complex": complex,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.nn.parameter.Parameter": torch.nn.Parameter,
    "torch.serialization._get_layout": torch.serialization._get_layout,
    "torch._tensor._rebuild_from_type_v2": torch._tensor._rebuild_from_type_v2,
    **{
        f"torch._utils.{name}": getattr(torch._utils, name)
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter",
                     "_rebuild_parameter_with_state")
    },
}  # fmt: skip
_VALUES: dict[str, Any] = {
    f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
} | {"torch.Tensor": torch.Tensor, "torch.storage.UntypedStorage": torch.UntypedStorage}
_FILLED_BY_KEY = (dict, OrderedDict, Counter)


class Unpickler(pickle._Unpickler):
    """Unpickler of protocols 0 to 5; ``persistent_load`` is set by ``torch.load``."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)  # type: ignore
    stack: list[Any]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: IO[bytes], *, encoding: str = "utf-8") -> None:
        super().__init__(file, fix_imports=False, encoding=encoding)
        self._stubs: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = modern_name(module, name)
        if full in _CALLABLE:
            return _CALLABLE[full]
        if full in _VALUES:
            return _VALUES[full]
        stub = self._stubs.get(full) or stub_for(full)
        if stub is None:
            raise refused(full)
        return self._stubs.setdefault(full, stub)

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"it refers to the copyreg extension {code}")

    def _instantiate(self, function: Any, arguments: Any, named: Any = None) -> None:
        """Push what a call gives; torch's functions and stubs alone are called."""
        allowed = (*_CALLABLE.values(), *self._stubs.values())
        if not any(function is known for known in allowed):
            raise pickle.UnpicklingError(f"it calls a {type(function).__name__}")
        self.stack.append(function(*arguments, **(named or {})))

    def _take(self, count: int) -> list[Any]:
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def load_reduce(self) -> None:
        self._instantiate(*self._take(2))

    def load_newobj_ex(self) -> None:
        self._instantiate(*self._take(3))

    def load_build(self) -> None:
        """State goes to stubs alone; that of the containers that bidm makes of subclasses is left out."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Stub):
            target.__setstate__(state)
        elif type(target) not in (list, *_FILLED_BY_KEY):
            raise pickle.UnpicklingError(f"it sets attributes of a {type(target).__name__}")

    def load_binpersid(self) -> None:
        identifier = self.stack.pop()
        if type(identifier) is not tuple or not identifier or identifier[0] not in ("storage", b"storage"):
            raise pickle.UnpicklingError("it refers to something outside that is no storage")
        self.stack.append(self.persistent_load(identifier))

    def load_persid(self) -> None:
        raise pickle.UnpicklingError("it refers to something outside that is no storage")

    def load_bytearray8(self) -> None:
        length = int.from_bytes(self.read(8), "little")
        content = self.read(length)
        if len(content) != length:
            raise EOFError
        self.stack.append(bytearray(content))

    def _fill(
        self, allowed: tuple[type, ...], fill: Callable[[Any, list[Any]], None], items: list[Any]
    ) -> None:
        if type(self.stack[-1]) not in allowed:
            raise pickle.UnpicklingError(f"it fills a {type(self.stack[-1]).__name__}")
        fill(self.stack[-1], items)

    def load_append(self) -> None:
        self._fill((list,), list.extend, self._take(1))

    def load_appends(self) -> None:
        self._fill((list,), list.extend, self.pop_mark())

    def load_additems(self) -> None:
        self._fill((set,), set.update, self.pop_mark())

    def load_setitem(self) -> None:
        self._fill(_FILLED_BY_KEY, _set_items, self._take(2))

    def load_setitems(self) -> None:
        self._fill(_FILLED_BY_KEY, _set_items, self.pop_mark())


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[key] = value


Unpickler.dispatch |= {
    pickle.REDUCE[0]: Unpickler.load_reduce,
    pickle.NEWOBJ[0]: Unpickler.load_reduce,
    pickle.NEWOBJ_EX[0]: Unpickler.load_newobj_ex,
    pickle.BUILD[0]: Unpickler.load_build,
    pickle.BINPERSID[0]: Unpickler.load_binpersid,
    pickle.PERSID[0]: Unpickler.load_persid,
    pickle.BYTEARRAY8[0]: Unpickler.load_bytearray8,
    pickle.APPEND[0]: Unpickler.load_append,
    pickle.APPENDS[0]: Unpickler.load_appends,
    pickle.ADDITEMS[0]: Unpickler.load_additems,
    pickle.SETITEM[0]: Unpickler.load_setitem,
    pickle.SETITEMS[0]: Unpickler.load_setitems,
}


def load(file: IO[bytes], *, encoding: str = "utf-8") -> Any:
    """The object of one pickle.

    Raises:
        Exception: whatever a damaged or hostile pickle leads to, BidmError for a name that is not let in.
    """
    return Unpickler(file, encoding=encoding).load()
