"""Compiled Programs: how they are made, written, loaded and called."""
