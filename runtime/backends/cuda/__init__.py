"""The `cuda` target's runtime: device memory, kernels, matrix products and attention on NVIDIA's own libraries."""
