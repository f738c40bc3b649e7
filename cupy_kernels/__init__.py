"""CUDA kernels for packed 1-bit layers, compiled at run time through CuPy. Knows torch's tensors, not bidm.

    launcher = CudaLauncher(device_index=0)
    signs = pack(launcher, x, thresholds)               # x [N, H, W, C], float32, float16 or bfloat16
    y = convolve(launcher, signs, weights, x.dtype)     # [N, H', W', O]

README.md names the kernels (CUDA C without any header) and the modules around them.
"""
