"""Losses, one file each: the loss ``token-contrast`` is the only one of ``token_contrast.py``."""
