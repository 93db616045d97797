"""Part 12: what the artifact was made of and by what, its files with their hashes, licence and model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitlower.tools.render import format_bytes
from bitlower.tools.report.blocks import Block, Chapter, Field, Listing, Prose, plain_table
from bitlower.tools.report.contents import Material

ABOUT = (
    "What the figures depend on. Equal inputs, seed and versions give an artifact of equal bytes on the same kind of "
    "processor; the hashes say whether two runs had them."
)
_LICENCES = ("license", "licence", "copying", "notice")
"""How names of files begin that say what one may do with a model."""


def environment_chapter(material: Material) -> Chapter:
    """Versions, data, files, licence, recipe and model card."""
    manifest = material.manifest
    blocks: list[Block] = [
        plain_table("Versions", ("package", "version"), list(manifest.versions.items())),
        plain_table("The model", ("entry", "value"), _program(material)),
        plain_table(
            "Data and seed", ("entry", "value"), [(key, _plain(value)) for key, value in manifest.provenance.items()]
        ),
        Prose(_licence(material), strong="Licence."),
    ]
    if material.recipe:
        blocks.append(Listing("The recipe", material.recipe))
    blocks.append(
        plain_table(
            f"{len(manifest.files)} files, {format_bytes(manifest.bytes)}",
            ("file", "bytes", "sha256"),
            [(name, entry.bytes, Field(entry.sha256)) for name, entry in manifest.files.items()],
            folded=True,
        )
    )
    if material.card:
        blocks.append(Listing("The model card, README.md", material.card))
    return Chapter("environment", "Environment and model card", ABOUT, tuple(blocks))


def _program(material: Material) -> list[tuple[str, str]]:
    program, manifest = material.manifest.program, material.manifest
    rows = [
        ("source", program.source or "a module in memory"),
        ("task", program.task),
        ("passes", ", ".join(program.passes)),
        ("inputs", "; ".join(program.inputs)),
        ("outputs", "; ".join(program.outputs)),
        ("written by", manifest.backend),
        ("options", ", ".join(f"{key}: {value}" for key, value in manifest.backend_options.items()) or "none"),
        ("digest of the program", program.digest),
    ]
    return [(name, value or "–") for name, value in rows]


def _licence(material: Material) -> str:
    names = [name for name in material.manifest.files if name.rpartition("/")[2].lower().startswith(_LICENCES)]
    if names:
        return f"The model came with {', '.join(names)}, which the artifact carries along."
    return "No licence file came with the model; what its publisher asks for holds for the artifact too."


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {entry}" for key, entry in value.items())
    return str(value)
