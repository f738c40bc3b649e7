"""Classes and functions that a pickle asks for, read without running it, and those that bidm lets in.

A pickle is a small program; the names it asks for are all it can reach. Names fall in three groups: what
tensors are made of (the restricted unpicklers handle these), harmless book-keeping that is replaced by an
inert :class:`Stub` or a plain dict or list, and everything else, which is refused by name.
"""

from __future__ import annotations

import _compat_pickle
import pickletools
import re
from collections import OrderedDict
from typing import IO, Any, cast

from bidm_cli.errors import BidmError

_TENSOR_PATTERN = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.serialization\._get_layout"
    r"|torch\.(nn\.parameter\.Parameter|Tensor|Size|device|storage\.(Typed|Untyped)Storage)"
    r"|torch(\.cuda)?\.[A-Z][A-Za-z0-9]*Storage"
    r"|torch\.(float|bfloat|half|double|int|uint|short|long|bool|complex|cfloat|cdouble)[a-z0-9_]*"
)

_MAPPING_PATTERN = re.compile(
    r"collections\.defaultdict|(pytorch_lightning|lightning|lightning_fabric)(\.\w+)*\.AttributeDict"
    r"|easydict\.EasyDict|addict\.addict\.Dict|munch\.\w*Munch|box\.(box\.)?Box|dotmap\.DotMap"
    r"|attrdict(ionary)?(\.\w+)*\.Attr(Map|Dict)|(yacs|fvcore\.common)\.config\.CfgNode"
    r"|(mmcv\.utils|mmengine\.config)\.config\.ConfigDict|diffusers\.configuration_utils\.FrozenDict"
)
_LIST_PATTERN = re.compile(r"collections\.deque")
_STUB_PATTERN = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|omegaconf|ml_collections)(\.\w+)+"
    r"|argparse\.Namespace|types\.SimpleNamespace|jsonargparse(\.\w+)*\.Namespace"
    r"|numpy\.(core|_core)\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)"
    r"|numpy\.random(\.\w+)+|random\.Random"
    r"|numpy\.(dtype|ndarray|bool_?|u?int\d*_?|float\d*_?|complex\d*_?|str_|bytes_|longlong|ulonglong)"
    r"|numpy\.dtypes\.\w+"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
    r"|datetime\.(datetime|date|time|timedelta|timezone)|zoneinfo\.ZoneInfo(\._unpickle)?"
    r"|decimal\.Decimal|fractions\.Fraction|uuid\.(UUID|SafeUUID)|collections\.(ChainMap|User\w+)"
    r"|torch\.torch_version\.TorchVersion|torch\.optim\.lr_scheduler\.\w+"
    r"|(\w+\.)+(ModelMeanType|ModelVarType|LossType)(\.\w+)?"
    r"|(accelerate|transformers|diffusers)(\.\w+)*\.\w+(Type|Strategy|Mode|Backend|Version)(\.\w+)?"
    r"|typing\.\w+"
    r"|copyreg\._reconstructor"
    r"|builtins\.(int|float|str|bool|list|dict|tuple|frozenset|bytes|object|NoneType|slice|range)"
)
_MOST_NAMES = 1000


class Stub:
    """Stands in for an object of an allowed class: keeps what the file says about it and does nothing.

    Attributes:
        arguments: what the class was called with. state: what pickle would have restored it from.
    """

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *arguments: Any, **_: Any) -> Stub:
        stub = object.__new__(cls)
        stub.arguments = arguments
        return stub

    def __init__(self, *arguments: Any, **_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class MappingStub:
    """Stands in for a dict's subclass: calling it gives an OrderedDict, which then takes the items."""

    def __new__(cls, *_: Any, **__: Any) -> MappingStub:
        return cast("MappingStub", OrderedDict())


class ListStub:
    """Stands in for a class that is filled like a list: calling it gives one, which then takes the items."""

    def __new__(cls, *_: Any, **__: Any) -> ListStub:
        return cast("ListStub", [])


def stubs_for(names: set[str]) -> list[tuple[type, str]]:
    """Stubs for those of ``names`` that are not tensors' own, as ``torch.serialization.safe_globals`` takes.

    Raises:
        BidmError: a name that is not on the list.
    """
    found = ((stub_for(name), name) for name in sorted(names))
    return [(stub, name) for stub, name in found if stub is not None]


def stub_for(name: str) -> type | None:
    """Stub for a class or function; None for what tensors are made of.

    Raises:
        BidmError: the name is not on the list.
    """
    if _TENSOR_PATTERN.fullmatch(name):
        return None
    patterns = ((_MAPPING_PATTERN, MappingStub), (_LIST_PATTERN, ListStub), (_STUB_PATTERN, Stub))
    kind = next((kind for pattern, kind in patterns if pattern.fullmatch(name)), None)
    if kind is None:
        raise refused(name)
    # One class a name: torch looks stubs up by the class, and messages name it.
    return type(name.rpartition(".")[2], (kind,), {"__module__": __name__})


def refused(name: str) -> BidmError:
    """The error for a name that is not let in."""
    return BidmError(
        f"it asks to load {printable(name)}, which is neither tensors nor known to be harmless, and "
        "could run code; refused. Keep only the weights: torch.save(model.state_dict(), ...)"
    )


def collect_names(stream: IO[bytes], names: set[str]) -> set[str]:
    """Add every "module.name" that one pickle refers to; leaves ``stream`` after the pickle's end.

    Returns the names of its instructions.

    Raises:
        ValueError: not a pickle, or cut short; ``names`` holds what came before.
    """
    strings: list[str] = ["", ""]
    memo: dict[int, str] = {}
    instructions: set[str] = set()
    for opcode, argument, _ in pickletools.genops(stream):
        instructions.add(opcode.name)
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            names.add(modern_name(module, name))
        elif opcode.name == "STACK_GLOBAL":
            names.add(modern_name(*strings))
        elif opcode.name in ("EXT1", "EXT2", "EXT4"):
            names.add(f"copyreg extension {argument}")
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(str(argument))] = strings[1]
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = strings[1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            strings = [strings[1], memo.get(int(str(argument)), "")]
        elif isinstance(argument, str):
            strings = [strings[1], argument]
        if len(names) > _MOST_NAMES:
            raise ValueError(f"it refers to more than {_MOST_NAMES} classes")
    return instructions


def modern_name(module: str, name: str) -> str:
    """Python 2's names as Python 3's, the way unpicklers map them."""
    if (module, name) in _compat_pickle.NAME_MAPPING:
        module, name = _compat_pickle.NAME_MAPPING[(module, name)]
    elif module in _compat_pickle.IMPORT_MAPPING:
        module = _compat_pickle.IMPORT_MAPPING[module]
    return f"{module}.{name}"


def printable(text: str, longest: int = 200) -> str:
    """Text out of a file, fit for one line of a message."""
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown if len(shown) <= longest else shown[: longest - 3] + "..."
