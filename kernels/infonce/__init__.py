"""Triton kernels of the loss, a file an operation: mathematics, shapes, costs, kernel, launcher.

Installed as ``fused_infonce.kernels``. Nothing here knows the algorithm around them: that is ``fused_infonce.sweep``.
"""
