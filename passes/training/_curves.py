"""Curves as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_WIDTH, _HEIGHT, _MARGIN = 640, 360, 60
"""Of the picture, in its units."""
_COLORS = ("steelblue", "firebrick", "darkgreen", "darkorange")

Curve = Sequence[tuple[float, float]]


def curves_svg(curves: Mapping[str, Curve], *, across: str, up: str) -> str:
    """Lines through points ``(x, y)`` by name, with the ends of both axes; values upwards on a logarithmic scale.

    Args:
        curves: points that are not finite, or not above 0, are left out.
        across: what the axis to the right is.
        up: what the axis upwards is.
    """
    shown = {name: [(x, y) for x, y in curve if 0 < y < math.inf] for name, curve in curves.items()}
    body = [f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 12}" text-anchor="middle">{across}</text>']
    body.append(f'<text x="12" y="20">{up}</text>')
    if any(shown.values()):
        body += _lines({name: curve for name, curve in shown.items() if curve})
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n' + "\n".join(body) + "\n</svg>\n"
    )


def _lines(curves: Mapping[str, Curve]) -> list[str]:
    points = [point for curve in curves.values() for point in curve]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(math.log(y) for _, y in points), max(math.log(y) for _, y in points)

    def place(x: float, y: float) -> tuple[float, float]:
        along = (x - left) / (right - left) if right > left else 0.5
        height = (math.log(y) - low) / (high - low) if high > low else 0.5
        return _MARGIN + along * (_WIDTH - 2 * _MARGIN), _HEIGHT - _MARGIN - height * (_HEIGHT - 2 * _MARGIN)

    bottom = _HEIGHT - _MARGIN
    body = [f'<path d="M{_MARGIN} {_MARGIN} V{bottom} H{_WIDTH - _MARGIN}" fill="none" stroke="black"/>']
    for x in (left, right):
        body.append(f'<text x="{place(x, math.exp(low))[0]:.1f}" y="{bottom + 18}" text-anchor="middle">{x:.4g}</text>')
    for y in (low, high):
        height = place(left, math.exp(y))[1]
        body.append(f'<text x="{_MARGIN - 6}" y="{height:.1f}" text-anchor="end">{math.exp(y):.3g}</text>')
    for index, (name, curve) in enumerate(curves.items()):
        color = _COLORS[index % len(_COLORS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve)
        body.append(f'<polyline points="{path}" fill="none" stroke="{color}"/>')
        body.append(
            f'<text x="{_WIDTH - _MARGIN}" y="{20 + 16 * index}" text-anchor="end" fill="{color}">{name}</text>'
        )
    return body
