"""CUDA kernels for packed 1-bit layers, compiled at run time through CuPy. Knows torch's tensors, not bidm.

    from cupy_kernels.cuda import CudaLauncher
    from cupy_kernels.conv import ConvShape, ConvWeights, convolve
    from cupy_kernels.signs import pack

    launcher = CudaLauncher(device_index=0)
    signs = pack(launcher, x, thresholds)               # x [N, H, W, C], float32, float16 or bfloat16
    y = convolve(launcher, signs, weights, x.dtype)     # [N, H', W', O]

The kernels (CUDA C without any header):

device.cuh     words, activation types, shared memory, and the few instructions that are PTX
signs.cuh      signs of a pixel as bytes, with count and magnitude
pack.cu        binarize and pack
norm_pack.cu   GroupNorm, SiLU, binarize and pack
conv.cuh       what both convolutions share: the identity they use, and the epilogue
conv_popc.cu   convolution on CUDA cores, any geometry
conv_bmma.cu   convolution on binary tensor cores

Around them:

kernel.py      a kernel by file, name and macros; its arguments as one struct; what a launcher does
compiler.py    NVRTC, and compiled kernels on disk
cuda.py        the launcher for GPUs
tiles.py       how conv_bmma.cu cuts a layer into tiles
signs.py, conv.py   the operations on tensors
"""
