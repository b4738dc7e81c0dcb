"""Kernels of the GPU in Triton: products of every sample's image with its own kernel, in tiles."""
