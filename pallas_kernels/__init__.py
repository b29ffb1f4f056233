"""Low-precision formats, masks and kernels for JAX on GPUs, with a reference on any backend."""
