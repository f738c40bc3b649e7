"""CPU kernels of the numba backend.

vector.py       vectors in numba code: one source becomes AVX-512, AVX2, NEON or plain instructions
isa.py          which of these this process compiles for
count.py        the inner loop: counting differing bits of pixels x filters in registers
pack_kernel.py  signs, words and sums of magnitudes of activations
conv_kernel.py  convolution over words, with the epilogue in the store
jobs.py         the records that kernels read their arguments from
kernels.py      compiled on first use, cached on disk
team.py         threads: torch's own
"""
