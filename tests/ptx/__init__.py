"""Executes the PTX of compiled kernels on the CPU, with asynchronous operations as early or late as is allowed."""
