from __future__ import annotations

import io
import os
import pickle

import pytest

from bidm_cli.checkpoints.reading.pickle_names import MappingStub, Stub, collect_names, printable, stubs_for
from bidm_cli.errors import BidmError


class Runs:
    """Pickles to a call of os.system."""

    def __reduce__(self) -> tuple:
        return os.system, ("true",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_names_of_every_protocol(protocol: int) -> None:
    names: set[str] = set()
    # The module's name is pickled twice, so that the second comes out of the memo.
    collect_names(io.BytesIO(pickle.dumps([Runs(), os.getpid, Runs()], protocol)), names)
    assert names >= {"posix.system", "posix.getpid"} or names >= {"nt.system", "nt.getpid"}


def test_names_before_the_damage_are_kept() -> None:
    data = pickle.dumps([Runs(), "x" * 100], 2)
    names: set[str] = set()
    with pytest.raises(ValueError):
        collect_names(io.BytesIO(data[:-50]), names)
    assert "posix.system" in names


def test_python_2_names_are_translated() -> None:
    names: set[str] = set()
    collect_names(io.BytesIO(b"c__builtin__\neval\n."), names)
    collect_names(io.BytesIO(b"(i__builtin__\neval\n."), names)
    assert names == {"builtins.eval"}


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
        "argparse.Namespace",
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.base.ContainerMetadata",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "numpy.float64",
        "numpy.ndarray",
        "pathlib.PosixPath",
        "typing.Any",
        "builtins.dict",
    ],
)
def test_harmless_names_get_an_inert_stub(name: str) -> None:
    ((stub, as_name),) = stubs_for({name})
    assert as_name == name
    assert issubclass(stub, Stub)
    value = stub(1, "two")
    value.__setstate__({"a": 1})
    assert (value.arguments, value.state) == ((1, "two"), {"a": 1})
    assert {stub: 1}[stub] == 1


@pytest.mark.parametrize(
    "name", ["collections.defaultdict", "pytorch_lightning.utilities.parsing.AttributeDict"]
)
def test_dict_like_names_become_dicts(name: str) -> None:
    ((stub, _),) = stubs_for({name})
    assert issubclass(stub, MappingStub)
    assert stub(list) == {}


@pytest.mark.parametrize(
    "name",
    [
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch.FloatStorage",
        "torch.cuda.HalfStorage",
        "torch.float16",
        "torch.bfloat16",
        "torch.Size",
    ],
)
def test_tensors_need_no_stub(name: str) -> None:
    assert stubs_for({name}) == []


@pytest.mark.parametrize(
    "name",
    [
        "posix.system",
        "os.system",
        "nt.system",
        "builtins.eval",
        "builtins.exec",
        "builtins.getattr",
        "builtins.__import__",
        "io.open",
        "subprocess.Popen",
        "torch.load",
        "torch.hub.load",
        "torch.FloatTensor",
        "torch.jit._serialization.load",
        "torch.nn.modules.linear.Linear",
        "numpy.load",
        "numpy.fromfile",
        "numpy.core.multiarray.fromfile",
        "argparse.FileType",
        "argparse.Namespace.__init__",
        "argparse.Namespace\nx",
        "pathlib.Path.write_text",
        "pytorch_lightning",
        "pytorch_lightning_evil.x",
        "my_pytorch_lightning.x",
        "xargparse.Namespace",
        "copyreg.__newobj__",
        "operator.attrgetter",
        "functools.partial",
        "codecs.open",
        "",
    ],
)
def test_everything_else_is_refused_by_name(name: str) -> None:
    with pytest.raises(BidmError, match="refused") as caught:
        stubs_for({"collections.OrderedDict", name})
    assert printable(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_printable() -> None:
    assert printable("a\nb\x1b[31m") == "a?b?[31m"
    assert len(printable("x" * 1000)) == 200
