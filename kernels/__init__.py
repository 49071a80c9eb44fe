"""Triton kernels: one operator per file, device code and launcher; `configs` and `compile` need no device.

Layer 2: imported by `posecrafter_rt.ops`, and only where Triton is installed.
"""
