"""Every kernel compiled for every architecture, with NVRTC and without a GPU.

Fails on an error, on registers spilled beyond the limit below, and where binary tensor cores are not used.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cupy_kernels.compiler import OPTIONS, CompileError, cache_folder, compile_source, machine_code
from cupy_kernels.kernel import ACTIVATIONS, Kernel

if importlib.util.find_spec("cupy") is None:
    pytest.skip("cupy is not installed", allow_module_level=True)

ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120"]
WITH_BMMA = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a"]
SPILLED_BYTES = 64
"""Most that a kernel may spill: where the instruction is emulated, two blocks at once lack some registers."""
SPILLED_BY_PLANES = {
    ("sm_75", 2): 24, ("sm_75", 3): 12,
    ("sm_100", 2): 20, ("sm_100", 3): 12,
    ("sm_120", 2): 20, ("sm_120", 3): 20,
}  # fmt: skip
"""As much as was seen with NVRTC 13.0, of architectures without the instruction; all others spill nothing."""

HALF = torch.float16


def conv_bmma(filter_tiles: int, warps: int, words: int = 7, side: int = 3, planes: int = 1) -> Kernel:
    kernel = (("ROWS", side), ("COLUMNS", side))
    macros = (("WORDS", words), *kernel, ("FILTER_TILES", filter_tiles), ("WARPS", warps))
    return Kernel("conv_bmma.cu", "conv_bmma", "ConvArgs", HALF, (*macros, ("PLANES", planes)))


def conv_popc(dtype: torch.dtype = HALF, planes: int = 1) -> Kernel:
    return Kernel("conv_popc.cu", "conv_popc", "ConvArgs", dtype, (("PLANES", planes),))


def pack(lanes: int, dtype: torch.dtype = HALF, planes: int = 1) -> Kernel:
    return Kernel("pack.cu", "pack", "PackArgs", dtype, (*LANES[lanes], ("PLANES", planes)))


def norm_pack(lanes: int, dtype: torch.dtype = HALF, planes: int = 1) -> Kernel:
    return Kernel("norm_pack.cu", "norm_pack", "NormArgs", dtype, (*LANES[lanes], ("PLANES", planes)))


# As for 224 channels, then as for 1792, the most in LDM-4; norms of 2048 and more spill.
LANES = [(("LANES", 8), ("ROUNDS", 4)), (("LANES", 16), ("ROUNDS", 2)), (("LANES", 32), ("ROUNDS", 7))]
PACK = [pack(0, dtype) for dtype in ACTIVATIONS]
NORM = [norm_pack(1, dtype) for dtype in ACTIVATIONS]
WIDEST = [make(2, torch.float32, planes) for planes in (1, 2, 3) for make in (norm_pack, pack)]
WIDEST_TILES = [conv_bmma(7, 4), conv_bmma(8, 4), conv_bmma(8, 2, planes=2), conv_bmma(7, 2, planes=3)]
POPC = [conv_popc(dtype) for dtype in ACTIVATIONS]
TILES = [conv_bmma(7, 2), conv_bmma(8, 2), conv_bmma(4, 1, words=28, side=1)]
PLANES = [
    *(make(1, dtype, 2) for dtype in ACTIVATIONS for make in (pack, norm_pack)),
    *(conv_popc(dtype, 2) for dtype in ACTIVATIONS),
]


def kernels_for(architecture: str, planes: int) -> list[Kernel]:
    """Without the instruction the wide tiles are never used."""
    if planes > 1:
        tiles = [conv_bmma(8, 1, planes=planes), conv_bmma(4, 2, planes=planes), WIDEST_TILES[planes]]
        packed = [pack(0, HALF, planes), norm_pack(1, HALF, planes), conv_popc(HALF, planes)]
        return packed if architecture == "sm_75" else [*packed, *tiles]
    tiles = TILES[-1:] if architecture == "sm_75" else TILES
    return [PACK[1], NORM[1], POPC[1], *tiles]


def log_of(kernel: Kernel, architecture: str) -> str:
    options = (f"-arch={architecture}", *OPTIONS, *kernel.defines)
    return compile_source(kernel.source(), kernel.file, options)[1]


def check_log(kernel: Kernel, log: str, limit: int = SPILLED_BYTES) -> None:
    spilled = [int(found) for found in re.findall(r"(\d+) bytes spill stores", log)]
    assert spilled, log
    assert max(spilled) <= limit, f"{kernel.name} spills {spilled} bytes\n{log}"
    assert "warning" not in log, log


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills(architecture: str, planes: int) -> None:
    limit = SPILLED_BYTES if planes == 1 else SPILLED_BY_PLANES.get((architecture, planes), 0)
    kernels = kernels_for(architecture, planes)
    with ThreadPoolExecutor(2) as pool:
        for kernel, log in zip(kernels, pool.map(lambda k: log_of(k, architecture), kernels), strict=True):
            check_log(kernel, log, limit)


@pytest.mark.parametrize(
    "kernel", [*PACK, *NORM, *POPC, *WIDEST, *WIDEST_TILES, *PLANES], ids=lambda k: f"{k.name} {k.defines}"
)
def test_every_type_of_activations_and_the_widest_tiles(kernel: Kernel) -> None:
    check_log(kernel, log_of(kernel, "sm_90"))


def disassembler() -> Path | None:
    """nvdisasm of the package nvidia-cuda-nvdisasm."""
    found = sorted(Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/cu*/bin/nvdisasm"))
    return found[0] if found else None


@pytest.mark.skipif(disassembler() is None, reason="nvidia-cuda-nvdisasm is not installed")
@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("architecture", WITH_BMMA)
def test_binary_tensor_cores_are_used(architecture: str, planes: int, tmp_path: Path) -> None:
    """In the inner loop one for each 16 pixels x 8 filters of a warp and plane, nothing emulated."""
    kernel = conv_bmma(7, 2, planes=planes)
    path = tmp_path / "code.cubin"
    options = (f"-arch={architecture}", *OPTIONS, *kernel.defines)
    path.write_bytes(compile_source(kernel.source(), kernel.file, options)[0])
    command = [str(disassembler()), "-c", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\bBMMA\.168256\.AND\.POPC\b", listing)) == 7 * 2 * planes
    (loop,) = (block for block in re.split(r"^\.L_\w+:", listing, flags=re.MULTILINE) if "BMMA" in block)
    # Two pixel tiles of each plane; filters once for all planes.
    assert len(re.findall(r"\bLDS\b", loop)) - planes * 2 * 4 < 2 * 7 * 2
    assert "IMMA" not in listing and "SHFL" not in listing


def test_compiled_code_is_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIDM_KERNEL_CACHE", str(tmp_path / "kernels"))
    code = machine_code(PACK[0], "sm_90")
    assert code[:4] == b"\x7fELF"
    (path,) = cache_folder().iterdir()
    path.write_bytes(b"kept")
    assert machine_code(PACK[0], "sm_90") == b"kept"
    for other in (machine_code(PACK[1], "sm_90"), machine_code(PACK[0], "sm_80")):
        assert other[:4] == b"\x7fELF"
    assert len(list(cache_folder().iterdir())) == 3


def test_a_folder_that_cannot_be_written_to_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BIDM_KERNEL_CACHE", str(tmp_path / "file"))
    assert machine_code(PACK[0], "sm_90")[:4] == b"\x7fELF"


def test_errors_name_the_file_and_line() -> None:
    broken = PACK[0].source().replace("bool exists = pixel <", "bool exists = nothing <")
    with pytest.raises(CompileError, match=r"pack\.cu\(\d+\): error: identifier .nothing. is undefined"):
        compile_source(broken, "pack.cu", ("-arch=sm_90", *OPTIONS, *PACK[0].defines))


def test_the_driver_takes_what_the_launcher_gives() -> None:
    """Names and arguments of CuPy's driver functions, as far as they can be tried without a driver."""
    from cupy.cuda import driver

    calls = {
        "launchKernel": (0, 1, 1, 1, 256, 1, 1, 0, 0, 0, 0),
        "moduleLoadData": (b"",),
        "moduleGetFunction": (0, "pack"),
        "funcSetAttribute": (0, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 1),
    }
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the other tests launch for real")
    for name, arguments in calls.items():
        with pytest.raises(RuntimeError):  # and not TypeError
            getattr(driver, name)(*arguments)
