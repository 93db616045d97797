"""The check of a checkpoint: its weights bit for bit, its outputs, and what its client makes of it."""
