"""Kernels for GPUs: blocks of threads, tiles in shared memory, matrix instructions."""
