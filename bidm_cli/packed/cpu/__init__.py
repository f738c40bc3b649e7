"""CPU kernels of the numba backend.

isa.py              the instruction set that this process compiles for, and the tiles that go with it
vector.py           vectors in numba code: one source becomes AVX-512, AVX2, NEON or plain instructions
vector_math.py      functions of vectors
count.py            the inner loop: counting differing bits of pixels x filters in registers
pack_kernel.py      signs, words and sums of magnitudes of activations, norm and SiLU before them
conv_kernel.py      convolution over words, with the epilogue in the store
norm_kernel.py      group norms as a factor and an offset a channel (norm.py runs it)
attention_kernel.py float attention (attention.py runs it; multiply.py, transpose.py: its inner loops)
mix_kernel.py       blending of cross-timestep connections (blend.py runs it)
program_kernel.py   kernels one after the other in one team (program.py runs them)
weights.py          a layer's tensors as the kernels want them
parts.py            channels that lie in two places
tuning.py           tiles by timing, remembered for the machine
plan.py             a layer on one shape: workspaces, records, launches
jobs.py             the records that kernels read their arguments from
kernels.py          kernels compiled on first use and cached on disk
team.py             threads: torch's own
"""
