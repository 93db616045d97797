"""Permutation of channels: which axes share an order, and the graph with another order."""
