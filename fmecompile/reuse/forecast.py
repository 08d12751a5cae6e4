"""Forecasts: the next value of a cut from the differences of those that were computed.

Per cut the run-time state is the tuple D_0 .. D_order, all of the shape of the cut; D_0 is the value of the last full
step. A full step renews it, D_{m+1} = scale_{m+1} * (new D_m - old D_m), and a reuse step sums coefficient_m * D_m.
Scales and coefficients are floats known on the host, so they are inputs of a graph and one graph serves every
distance.

Two forms, the same up to order 1. ``newton``: divided differences, the polynomial through the last order + 1 computed
values, exact on polynomials of that degree for any spacing. ``taylor``: what TaylorSeer releases, where each difference
is divided by the distance to the full step before and stands for a derivative; from order 2 on it is off even on
parabolas, since a backward difference is the slope half an interval ago.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Form = Literal["newton", "taylor"]
FORMS: tuple[Form, ...] = ("newton", "taylor")


def taylor_coefficients(distance: float, order: int) -> tuple[float, ...]:
    """Weights of D_0 .. D_order as derivatives: distance^m / m!. ``distance`` counts from the last full step."""
    weights = [1.0]
    for m in range(1, order + 1):
        weights.append(weights[-1] * distance / m)
    return tuple(weights)


def newton_coefficients(position: float, computed: Sequence[float], order: int) -> tuple[float, ...]:
    """Weights of D_0 .. D_order as divided differences, at ``position``.

    ``computed`` are the positions of the full steps so far, the last one last. Orders for which too few were computed
    weigh 0, as their differences are 0 too.
    """
    weights = [1.0]
    for m in range(1, order + 1):
        weights.append(weights[-1] * (position - computed[-m]) if m < len(computed) else 0.0)
    return tuple(weights)


def difference_scales(computed: Sequence[float], order: int, form: Form) -> tuple[float, ...]:
    """The scales of D_1 .. D_order at the full step ``computed[-1]``; 0 for orders that too few full steps feed.

    ``computed`` are distinct positions of full steps, this one last.
    """
    back = (1,) * order if form == "taylor" else tuple(range(1, order + 1))
    return tuple(1.0 / (computed[-1] - computed[-1 - back[m]]) if m + 1 < len(computed) else 0.0 for m in range(order))


def renew(differences: Sequence[float], value: float, scales: Sequence[float]) -> tuple[float, ...]:
    """D_0 .. D_order after a full step that computed ``value``, on floats; before the first one all are 0."""
    renewed = [value]
    for scale, old in zip(scales, differences, strict=False):
        renewed.append(scale * (renewed[-1] - old))
    return tuple(renewed)
