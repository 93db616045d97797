"""bitlower: lower transformer models to few bits.

A model becomes a :class:`Program`, passes turn a Program into a Program, a backend turns a Program into an artefact.
"""

from pathlib import Path

# In a checkout, ir/, passes/, ... lie beside this folder instead of in it.
if not (Path(__file__).parent / "ir").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__version__ = "0.1.0"
