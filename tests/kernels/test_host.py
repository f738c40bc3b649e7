"""The CPU that plays a GPU: does it do what a GPU does, and does it notice what a GPU would punish?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cupy_kernels import kernel as kernel_module
from cupy_kernels.kernel import FOLDER, Kernel
from tests.kernels.host_launcher import HostLauncher, KernelFailure, available

pytestmark = pytest.mark.skipif(not available(), reason="no g++ here")

PREAMBLE = """#include "device.cuh"

struct TestArgs {
  int* out;
  int count;
};

"""


def run(
    body: str,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    grid: tuple[int, int] = (1, 1),
    **options: object,
) -> torch.Tensor:
    """A kernel with this body, over 256 numbers, blocks of 256 threads."""
    (folder / "device.cuh").write_text((FOLDER / "device.cuh").read_text())
    text = (
        PREAMBLE + f'extern "C" __global__ void __launch_bounds__(256) test(TestArgs args) {{\n{body}\n}}\n'
    )
    (folder / "test.cu").write_text(text)
    monkeypatch.setattr(kernel_module, "FOLDER", folder)
    kernel_module._inlined.cache_clear()
    out = torch.zeros(256, dtype=torch.int32)
    try:
        launcher = HostLauncher(**options)  # type: ignore[arg-type]
        args = {"out": out, "count": 256}
        launcher.launch(Kernel("test.cu", "test", "TestArgs", torch.float32), grid, args, shared=1024)
    finally:
        kernel_module._inlined.cache_clear()
    return out


BARRIER_IN_A_BRANCH = "if (threadIdx.x < 128) __syncthreads();\nargs.out[threadIdx.x] = 1;"
EARLY_EXIT = "if (threadIdx.x == 3) return;\n__syncwarp();"
TWO_FUNCTIONS = "if (threadIdx.x % 32 < 16) __syncwarp(); else __shfl_sync(~0u, 1, 0);"
SHARED = "SHARED_MEMORY(memory);\nint* values = reinterpret_cast<int*>(memory);\n"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (BARRIER_IN_A_BRANCH, "barrier divergence"),
        (EARLY_EXIT, "without all 32 lanes"),
        (TWO_FUNCTIONS, "different functions"),
    ],
)
@pytest.mark.parametrize("schedule", [0, 1])
def test_divergence_is_reported(
    body: str, says: str, schedule: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(KernelFailure, match=says):
        run(body, monkeypatch, tmp_path, schedule=schedule)


def test_shared_memory_starts_as_garbage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = run(SHARED + "args.out[threadIdx.x] = values[threadIdx.x];", monkeypatch, tmp_path)
    assert (out == torch.tensor(0xCBCBCBCB - 2**32, dtype=torch.int64).int()).all()


@pytest.mark.parametrize("schedule", [0, 1])
def test_the_schedules_differ_where_a_barrier_is_missing(
    schedule: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Who writes last is not defined here: each schedule has its own answer."""
    body = SHARED + "values[0] = threadIdx.x;\n__syncthreads();\nargs.out[threadIdx.x] = values[0];"
    out = run(body, monkeypatch, tmp_path, schedule=schedule)
    assert (out == (255 if schedule == 0 else 0)).all()


@pytest.mark.parametrize("schedule", [0, 1])
def test_the_schedules_differ_where_blocks_write_to_the_same_place(
    schedule: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = run("args.out[threadIdx.x] = blockIdx.x;", monkeypatch, tmp_path, grid=(3, 1), schedule=schedule)
    assert (out == (2 if schedule == 0 else 0)).all()


def test_shuffles_and_barriers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = (
        SHARED
        + """
  int sum = threadIdx.x;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = sum;
  __syncthreads();
  args.out[threadIdx.x] = values[threadIdx.x * 7 % 8] + 1000 * __shfl_sync(~0u, (int)threadIdx.x, 5);"""
    )
    out = run(body, monkeypatch, tmp_path)
    expected = [sum(range(32 * w, 32 * w + 32)) for w in range(8)]
    assert out.tolist() == [expected[t * 7 % 8] + 1000 * (t // 32 * 32 + 5) for t in range(256)]


@pytest.mark.parametrize("emulated", [False, True])
def test_bit_matrix_product_has_the_layout_of_the_ptx_manual(
    emulated: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A row per bit set: A[r] has r + 1 ones in word r % 8, B's column c has all ones in word c."""
    body = """
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Word a[4], b[2];
  for (int i = 0; i < 4; i++) {
    int row = g + i % 2 * 8, word = t + i / 2 * 4;
    a[i] = word == row % 8 ? (1u << (row + 1)) - 1 : 0;
  }
  for (int i = 0; i < 2; i++) b[i] = t + 4 * i == g ? ~0u : 0;
  int d[4] = {100, 200, 300, 400};
  bmma(d, a, b);
  if (threadIdx.x < 32)
    for (int i = 0; i < 4; i++) args.out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i] - 100 * (i + 1);"""
    out = run(body, monkeypatch, tmp_path, macros=("EMULATE_BMMA",) if emulated else ())
    expected = torch.zeros(16, 8, dtype=torch.int32)
    for row in range(16):
        expected[row, row % 8] = row + 1
    assert torch.equal(out[:128].reshape(16, 8), expected)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("args.out[threadIdx.x + 1] = 1;", "heap-buffer-overflow"),
        (SHARED + "values[threadIdx.x + 1] = 1;", "heap-buffer-overflow"),
        ("args.out[threadIdx.x] = 2147483647; args.out[threadIdx.x] += 1;", "signed integer overflow"),
    ],
)
def test_sanitizers_see_the_kernel(
    body: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(KernelFailure, match=says) as caught:
        run(body, monkeypatch, tmp_path, sanitize=True)
    assert "test.cu:" in str(caught.value)


def test_results_come_back_from_a_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = run("args.out[threadIdx.x] = args.count + threadIdx.x;", monkeypatch, tmp_path, process=True)
    assert out.tolist() == list(range(256, 512))


def test_kernels_take_no_shared_memory_but_the_dynamic_one() -> None:
    """Static shared memory would not be filled with garbage, nor would its end be watched."""
    for path in FOLDER.glob("*.cu*"):
        code = re.sub(r"#define SHARED_MEMORY.*", "", path.read_text())
        assert "__shared__" not in code, path.name
