"""The version of bitlower, stated once."""

__version__ = "0.1.0"
