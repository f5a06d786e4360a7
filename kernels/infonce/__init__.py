"""Triton kernels of the loss, a file an operation: mathematics, shapes, costs, kernel, launcher.

Installed as ``fused_infonce.kernels``. None knows the algorithm around it: that is ``fused_infonce.tiled``.
"""
