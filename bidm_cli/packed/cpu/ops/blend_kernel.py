"""Blending of cross-timestep connections: out = (1 - beta) new + beta old, beta by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import carray, float32

from bidm_cli.packed.cpu.codegen.vector import (
    address_of,
    joined,
    load_first_floats,
    load_float,
    load_floats,
    next_item,
    splat,
    store,
    store_first,
)
from bidm_cli.packed.cpu.codegen.vector_math import fused


def mix_kernel() -> Callable[[Any], None]:
    """The kernel's source, for :func:`bidm_cli.packed.cpu.runtime.compile.compiled`; reads a MIX_JOB."""

    def mix(jobs: Any) -> None:
        job = carray(jobs, (1,))[0]
        blocks = (job.length + job.block - 1) // job.block
        found_work = False
        while True:
            item = next_item(address_of(jobs))
            image = item // blocks
            if image >= job.images:
                break
            found_work = True
            first = (item - image * blocks) * job.block
            last = min(first + job.block, job.length)
            beta = load_float(job.betas + 4 * image * job.beta_step)
            share, rest = splat(beta, 32), splat(float32(1.0) - beta, 32)
            for i in range(image * job.length + first, image * job.length + last, 32):
                left = image * job.length + last - i
                if left >= 32:
                    new = load_floats(job.new + 4 * i, 32)
                    store(job.out + 4 * i, fused(load_floats(job.old + 4 * i, 32), share, new * rest))
                else:
                    new = load_first_floats(job.new + 4 * i, left, 32)
                    old = load_first_floats(job.old + 4 * i, left, 32)
                    store_first(job.out + 4 * i, fused(old, share, new * rest), left)
        joined(jobs, found_work)

    return mix
