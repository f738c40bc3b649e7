"""Kernel arguments: the struct in the .cu file, filled by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cupy_kernels.kernel import FOLDER, Kernel, arguments_of

PACK = Kernel("pack.cu", "pack", "PackArgs", torch.float16)


def test_the_layout_is_read_from_the_source() -> None:
    layout = PACK.layout()
    assert layout.names == (
        *("x", "thresholds", "words", "counts", "magnitudes"),
        *("divisor", "pixels", "channels", "aligned"),
    )
    assert layout.fields is not None
    assert layout.fields["magnitudes"] == (np.dtype(np.int64), 32)
    assert layout.fields["divisor"] == (np.dtype(np.float32), 40)
    assert layout.itemsize == 56


def test_every_struct_is_read_whole() -> None:
    """A member that the pattern misses would shift all that follow."""
    for file, struct in (("norm_pack.cu", "NormArgs"), ("conv_popc.cu", "ConvArgs"), ("pack.cu", "PackArgs")):
        kernel = Kernel(file, "", struct, torch.float32)
        body = kernel.source().split(f"struct {struct} {{\n")[1].split("\n};")[0]
        assert len(kernel.layout().names or ()) == len(body.splitlines())


def test_arguments_are_filled_by_name() -> None:
    x = torch.zeros(4, 8, dtype=torch.float16)
    arguments = arguments_of(PACK, {"x": x, "pixels": 4, "divisor": 2.5, "thresholds": None})
    assert (arguments["x"], arguments["pixels"], arguments["divisor"]) == (x.data_ptr(), 4, 2.5)
    assert arguments["thresholds"] == 0 and arguments["counts"] == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"x": torch.zeros(4, 8)},
        {"x": torch.zeros(8, 4, dtype=torch.float16).T},
        {"words": torch.zeros(4, dtype=torch.int64)},
        {"nothing": 3},
    ],
    ids=["type", "strides", "words", "name"],
)
def test_what_does_not_fit_is_an_error(fields: dict[str, torch.Tensor | int]) -> None:
    with pytest.raises(ValueError):
        arguments_of(PACK, fields)


def test_line_numbers_are_those_of_the_files() -> None:
    source = PACK.source()
    assert "#include" not in source
    lines = (FOLDER / "pack.cu").read_text().splitlines()
    struct = lines.index("struct PackArgs {") + 1
    before = source[: source.index("struct PackArgs {")]
    _, _, rest = before.rpartition("#line ")
    number = int(rest.split()[0]) + rest.count("\n") - 1
    assert number == struct
