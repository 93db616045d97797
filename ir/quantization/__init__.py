"""Quantization: grids, granularities, schemes, the numerics of scales, and packed codes."""
