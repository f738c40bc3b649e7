"""CPU kernels of the numba backend; see README.md beside this file."""
