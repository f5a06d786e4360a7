"""Triton kernels of fused_infonce."""
