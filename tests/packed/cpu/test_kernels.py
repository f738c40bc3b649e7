"""The CPU kernels as machine code: every instruction set, the cache on disk, threads."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.cpu.codegen.isa import (
    CANDIDATES,
    TILES,
    Tile,
    instruction_set,
    target,
)
from bidm_cli.packed.cpu.ops import kernels as known
from bidm_cli.packed.cpu.runtime import compile as compiling
from bidm_cli.packed.cpu.runtime import kernel_cache, kernels, threads
from bidm_cli.recipe.spec import BinarySpec
from tests.helpers import layer_of, random
from tests.small_ops import REFERENCE, NumbaOps

REPOSITORY = Path(__file__).parents[3]
GEOMETRY = LayerGeometry("conv2d", 300, 70, (3, 3), (1, 1), (1, 1, 1, 1))


FORMS = sorted(
    {
        tile
        for table in (TILES, CANDIDATES)
        for pair in table.values()
        for tile in pair
        if not tile.multiplies or instruction_set() == "amx"
    },
    key=str,
)


def random_words(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Words of activations [1, 6, 5, 10] and of weights [70, 9, 10] with 300 channels."""
    x = REFERENCE.binarize_pack(random((1, 6, 5, 300), seed), None)[0]
    return x, REFERENCE.binarize_pack(random((70, 9, 300), seed + 1), None)[0]


@pytest.mark.parametrize(
    "tile",
    [
        *FORMS,
        Tile("bytes", 8, 1, 1),
        Tile("pairs", 8, 4, 4),
        Tile("carry_save", 4, 3, 1),
    ],
    ids=str,
)
def test_every_form_of_the_inner_loop_counts_alike(tile: Tile) -> None:
    """LLVM lowers each form to this machine's instructions, whichever it was meant for."""
    words, weights = random_words()
    expected = REFERENCE.binary_conv2d(words, weights, GEOMETRY)
    assert torch.equal(NumbaOps(tile).binary_conv2d(words, weights, GEOMETRY), expected)


def random_planes(planes: int) -> tuple:
    """Arguments of ``planes_conv2d``."""
    offsets, scales = 1 + random((planes - 1, 300), 2), random((planes - 1,), 3)
    return random((1, 6, 5, 300), 4), random((300,), 5), offsets, scales, random_words()[1], GEOMETRY


PLANES = [(tile, planes) for planes in (1, 2, 3) for tile in FORMS]


@pytest.mark.parametrize(("tile", "planes"), PLANES, ids=str)
def test_every_form_of_the_inner_loop_counts_planes_alike(tile: Tile, planes: int) -> None:
    arguments = random_planes(planes)
    signs, dots = NumbaOps(tile).planes_conv2d(*arguments)
    expected_signs, expected_dots = REFERENCE.planes_conv2d(*arguments)
    assert torch.equal(signs, expected_signs) and torch.equal(dots, expected_dots)


@pytest.mark.parametrize("differ", [(True, True), (True, False), (False, True)], ids=str)
def test_counts_of_planes_do_not_overflow_on_very_wide_layers(differ: tuple[bool, bool]) -> None:
    """All bits of both planes, or of one, differ from the filters', which are -1."""
    channels = 40_000
    geometry, weights = LayerGeometry("conv2d", channels, 37), torch.zeros(37, 1, channels // 32).int()
    x = torch.full((1, 1, 3, channels), 1.0 if differ[0] else -1.0)
    offset = 0.5 if differ[0] == differ[1] else 2.0
    parts = torch.full((1, channels), offset), torch.tensor([0.25])
    first, second = (-channels if bit else channels for bit in differ)
    for tile in FORMS:
        signs, dots = NumbaOps(tile).planes_conv2d(x, torch.zeros(channels), *parts, weights, geometry)
        assert signs.flatten(1).float().mean(1).tolist() == [float(bit) for bit in differ]
        assert (dots == first + 0.25 * second).all()


def test_counts_do_not_overflow_on_very_wide_layers() -> None:
    """All bits differ, over far more words than a byte counter holds."""
    channels = 40_000
    words = torch.full((1, 1, 3, channels // 32), -1, dtype=torch.int32)
    weights = torch.zeros(5, 1, channels // 32, dtype=torch.int32)
    geometry = LayerGeometry("conv2d", channels, 5)
    for tile in FORMS:
        assert (NumbaOps(tile).binary_conv2d(words, weights, geometry) == -channels).all()


PROGRAM = """
import sys
import torch
import torch.nn.functional as F
from tests.packed.cpu.test_kernels import GEOMETRY, random_planes, random_words
from bidm_cli.packed.cpu.runtime import kernel_cache, kernels
from bidm_cli.packed.cpu.codegen.isa import instruction_set
from bidm_cli.packed.backends.numba import NumbaBackend
from bidm_cli.networks.fusion import Prologue
from bidm_cli.packed.backends.torch import TorchBackend
from tests.small_ops import REFERENCE, NumbaOps
numba, reference = NumbaBackend(), TorchBackend()
words, weights = random_words()
result = NumbaOps().binary_conv2d(words, weights, GEOMETRY)
assert torch.equal(result, REFERENCE.binary_conv2d(words, weights, GEOMETRY))
for planes in (1, 2, 3):
    arguments = random_planes(planes)
    found, expected = (ops.planes_conv2d(*arguments) for ops in (NumbaOps(), REFERENCE))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
x = torch.randn(3, 40, 6, 5)
assert torch.equal(NumbaOps().binarize_pack(x, None)[0], REFERENCE.binarize_pack(x, None)[0])
prologue = Prologue(torch.nn.GroupNorm(8, 40).requires_grad_(False), silu=True)
torch.testing.assert_close(numba.normalize(x, prologue), reference.normalize(x, prologue))
q, k, v = torch.randn(3, 2, 4, 37, 20)
torch.testing.assert_close(numba.attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
print(instruction_set(), len(kernels.LOADED), len(kernels.FRESH), 'numba' in sys.modules)
"""


def in_new_process(program: str = PROGRAM, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


X86 = ["generic", "avx2", "avx512", "avx512-vpopcntdq", "amx"]


def only_from(name: str) -> pytest.MarkDecorator:
    """Skip where the machine has not all of an instruction set."""
    has = instruction_set() in X86[X86.index(name) :] and platform.machine() in ("x86_64", "AMD64")
    return pytest.mark.skipif(not has, reason=f"needs an x86 machine with {name}")


AVX2 = "+avx,+avx2,+bmi,+bmi2,+fma,+popcnt,+sse4.2"
AVX512 = f"{AVX2},+avx512f,+avx512bw,+avx512vl,+avx512dq"


@pytest.mark.parametrize(
    ("cpu", "features", "expected"),
    [
        pytest.param("haswell", AVX2, "avx2", marks=only_from("avx2")),
        pytest.param("skylake-avx512", AVX512, "avx512", marks=[only_from("avx512"), pytest.mark.slow]),
        pytest.param(
            "icelake-server",
            f"{AVX512},+avx512vpopcntdq",
            "avx512-vpopcntdq",
            marks=[only_from("avx512-vpopcntdq"), pytest.mark.slow],
        ),
        pytest.param("x86-64", "+sse2", "generic", marks=[only_from("generic"), pytest.mark.slow]),
    ],
)
def test_older_machines_get_right_code(cpu: str, features: str, expected: str, tmp_path: Path) -> None:
    said = in_new_process(
        NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features, BIDM_KERNEL_CACHE=str(tmp_path / "cache")
    )
    assert said.startswith(expected)


def test_compiled_code_is_found_again_unless_its_sources_changed(tmp_path: Path) -> None:
    """The digest of all sources is part of each kernel's name in the cache; found again it needs no numba."""
    cache = str(tmp_path / "cache")
    _, loaded, fresh, has_numba = in_new_process(BIDM_KERNEL_CACHE=cache).split()
    assert int(fresh) == int(loaded) > 5 and has_numba == "True"
    assert in_new_process(BIDM_KERNEL_CACHE=cache).split()[1:] == [loaded, "0", "False"]
    changed = PROGRAM.replace("numba, ref", "kernel_cache.sources_digest = lambda: 'x'\nnumba, ref", 1)
    assert in_new_process(changed, BIDM_KERNEL_CACHE=cache).split()[2] == fresh


def test_kernels_run_where_nothing_can_be_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compiled in every process."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BIDM_KERNEL_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(kernels, "FRESH", [])
    assert not kernel_cache.is_writable()
    kernel = known.blend()
    assert kernels._address.__wrapped__(kernel) and kernels.FRESH == ["blend"]
    assert kernel_cache.read(kernel.name) is None


def test_damaged_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIDM_KERNEL_CACHE", str(tmp_path))
    code = compiling.compile_kernel(known.blend())
    assert kernel_cache.read("blend") == code
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        path.write_bytes(damaged)
        assert kernel_cache.read("blend") is None


def test_the_target_is_the_one_that_numba_compiles_for() -> None:
    from numba.core.registry import cpu_target

    assert target() == cpu_target.target_context.codegen().magic_tuple()


def test_processes_compile_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel is in the cache when it is told of; one that cannot be compiled is left out."""
    monkeypatch.setenv("BIDM_KERNEL_CACHE", str(tmp_path))
    odd = compiling.Kernel("bidm_cli.packed.cpu.ops.pack_kernel:make_nothing", (), 64)
    wanted = [known.blend(), known.attention()[0], odd]
    done = []
    for kernel in compiling.compile_in_processes(wanted, 2):
        assert kernel_cache.read(kernel.name) is not None
        done.append(kernel.name)
    assert sorted(done) == sorted(kernel.name for kernel in wanted[:2])


@pytest.fixture
def layer() -> nn.Module:
    return layer_of(nn.Conv2d(96, 64, 3, padding=1), BinarySpec())


def test_python_threads_do_not_disturb_each_other(layer: nn.Module) -> None:
    """Workspaces belong to one thread."""
    inputs = [random((1, 96, 16, 16), seed) for seed in range(4)]
    expected = [layer(x) for x in inputs]
    failures: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(layer(inputs[index]), expected[index]):
                failures.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def test_without_openmp_python_threads_do_the_work(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random((2, 96, 16, 16), 3)
    expected = layer(x)
    monkeypatch.setattr(threads, "openmp", lambda: None)
    kernels.launcher_of.cache_clear()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        layer._tensors = None
        assert torch.equal(layer(x), expected)
    finally:
        torch.set_num_threads(before)
        kernels.launcher_of.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP runtime is known on Linux")
def test_kernels_share_torchs_threads() -> None:
    assert threads.openmp() is not None
    program = """
import torch
torch.set_num_threads(2)
from torch import nn
from tests.helpers import random
from tests.helpers import layer_of
from bidm_cli.recipe.spec import BinarySpec
layer, x = layer_of(nn.Conv2d(64, 64, 3, padding=1), BinarySpec()), random((4, 64, 16, 16), 0)
torch.nn.functional.conv2d(x, torch.randn(64, 64, 3, 3))
layer(x)
tasks = lambda: open('/proc/self/status').read().split('Threads:')[1].split()[0]
before = tasks()
for _ in range(20):
    layer(torch.nn.functional.conv2d(x, torch.randn(64, 64, 3, 3), padding=1))
print(before == tasks(), 'numba.np.ufunc.workqueue' in __import__('sys').modules)
"""
    assert in_new_process(program, OMP_NUM_THREADS="2") == "True False"


def test_channels_last_goes_in_and_comes_out_without_copies(layer: nn.Module) -> None:
    x = random((2, 96, 8, 8), 1).contiguous(memory_format=torch.channels_last)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(x.contiguous()), y)
    assert torch.equal(layer(x[:, :, ::1, ::1].double()), y)


def test_a_team_that_does_not_help_is_left_alone_for_a_while() -> None:
    """On a busy machine the other threads come when everything is done, and cost the caller a wait."""
    heuristic = threads.TeamHeuristic()
    for _ in range(100):
        assert heuristic.wants_team()
        heuristic.update(2)
    for _ in range(heuristic.PATIENCE):
        assert heuristic.wants_team()
        heuristic.update(1)
    assert [heuristic.wants_team() for _ in range(heuristic.FIRST_REST + 1)] == [
        False
    ] * heuristic.FIRST_REST + [True]
    heuristic.update(1)  # still alone: a longer rest
    assert (
        sum(not heuristic.wants_team() for _ in range(4 * heuristic.FIRST_REST)) == 2 * heuristic.FIRST_REST
    )
    heuristic.update(2)  # help is back
    assert heuristic.wants_team()


@pytest.mark.skipif(threads.openmp() is None, reason="needs torch's OpenMP runtime")
def test_kernels_report_how_many_threads_found_work(monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[int] = []
    monkeypatch.setattr(threads._HEURISTIC, "update", updates.append)
    monkeypatch.setattr(threads._HEURISTIC, "wants_team", lambda: True)
    layer = layer_of(nn.Conv2d(256, 256, 3, padding=1), BinarySpec())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for _ in range(5):
            layer(random((4, 256, 32, 32), 0))
        together = list(updates)
        with threads.capturing(lambda launched: None):
            layer(random((4, 256, 32, 32), 0))
    finally:
        torch.set_num_threads(before)
    # A layer's two kernels in one team, or in one each where launches are captured.
    assert len(together) == 5 and len(updates) == 7 and set(updates) <= {1, 2}
