"""Rotary position embedding as an expression of one element, with the scalings in use.

With R = dim, pairs p = 0 … R/2 - 1 turn by the angle position · θ_p, θ_p = base^(-2p/R). The two elements of a pair lie
R/2 apart (`interleaved=false`) or side by side (`interleaved=true`). Elements from R on, and the last one of an odd R,
stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from attncc.check.values import Value, apply, constant, element_index
from attncc.ir.nodes import Index
from attncc.ir.rewrite import substitute
from attncc.ir.types import Kind
from attncc.source import Span


@dataclass(frozen=True, slots=True)
class Setting:
    """What a scaling starts from: `theta` is θ_p of pair `p` in plain rope."""

    theta: Value
    pair: Value
    base: Value
    dim: Value


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What a scaling makes of it: the frequency of pair p, and a factor on cosine and sine."""

    theta: Value
    amplitude: Value | None = None


@dataclass(frozen=True, slots=True)
class Scaling:
    """A scaling with its arguments; `function` computes the spectrum."""

    function: Callable[[Setting, Mapping[str, Value]], Spectrum]
    arguments: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class ScalingKind:
    """How a scaling is called: parameters in order, with the defaults of those that have one. `factors` is a row."""

    parameters: tuple[str, ...]
    defaults: Mapping[str, float]
    function: Callable[[Setting, Mapping[str, Value]], Spectrum]


def rotated(
    row: Value,
    position: Value,
    *,
    base: Value,
    scaling: Scaling | None,
    interleaved: bool,
    dim: Value,
    span: Span | None,
) -> Value:
    """The row turned by its position."""
    d = Value(element_index(span), Kind.INT)
    two = constant(2)
    half = apply("floordiv", dim, two)
    turned = apply("lt", d, half * two)
    if interleaved:
        pair = apply("floordiv", d, two)
        is_first = apply("eq", apply("mod", d, two), constant(0))
        partner = apply("bit_xor", d, constant(1))
    else:
        pair = apply("mod", d, half)
        is_first = apply("lt", d, half)
        partner = apply("where", is_first, d + half, d - half)
    # An element without a partner stands for its own, so that no index leaves the row.
    partner = apply("where", turned, partner, d)
    theta = apply("pow", base, -(pair / half))
    spectrum = Spectrum(theta)
    if scaling is not None:
        spectrum = scaling.function(Setting(theta, pair, base, dim), scaling.arguments)
    angle = position * spectrum.theta
    cosine, sine = apply("cos", angle), apply("sin", angle)
    if spectrum.amplitude is not None:
        cosine, sine = cosine * spectrum.amplitude, sine * spectrum.amplitude
    other = Value(substitute(row.expr, {Index("d"): partner.expr}), Kind.FLOAT, row.size)
    result = apply(
        "where", turned, row * cosine + other * sine * apply("where", is_first, constant(-1.0), constant(1.0)), row
    )
    return Value(result.expr, Kind.FLOAT, row.size)


def _clamped(x: Value) -> Value:
    """x in [0, 1]."""
    return apply("min", apply("max", x, constant(0.0)), constant(1.0))


def _slowed(share: Value, factor: Value, theta: Value) -> Value:
    """θ where share is 0, θ / factor where it is 1, and between them in between."""
    return (constant(1.0) - share) * theta + share * (theta / factor)


def _linear(setting: Setting, arguments: Mapping[str, Value]) -> Spectrum:
    return Spectrum(setting.theta / arguments["factor"])


def _ntk(setting: Setting, arguments: Mapping[str, Value]) -> Spectrum:
    dim = setting.dim
    stretched = setting.base * apply("pow", arguments["factor"], dim / (dim - constant(2)))
    half = apply("floordiv", dim, constant(2))
    return Spectrum(apply("pow", stretched, -(setting.pair / half)))


def _yarn(setting: Setting, arguments: Mapping[str, Value]) -> Spectrum:
    factor, original = arguments["factor"], arguments["original"]

    def pair_of(turns: Value) -> Value:
        """The pair, not a whole number, that turns so often over the original length."""
        return (
            setting.dim
            * apply("log", original / (turns * constant(2 * math.pi)))
            / (constant(2.0) * apply("log", setting.base))
        )

    low = apply("max", apply("floor", pair_of(arguments["beta_fast"])), constant(0.0))
    high = apply("min", apply("ceil", pair_of(arguments["beta_slow"])), setting.dim - constant(1))
    ramp = _clamped((setting.pair - low) / apply("max", high - low, constant(0.001)))
    amplitude = constant(0.1) * apply("log", apply("max", factor, constant(1.0))) + constant(1.0)
    return Spectrum(_slowed(ramp, factor, setting.theta), amplitude)


def _longrope(setting: Setting, arguments: Mapping[str, Value]) -> Spectrum:
    factor = Value(substitute(arguments["factors"].expr, {Index("d"): setting.pair.expr}), Kind.FLOAT)
    stretch = apply("log", apply("max", arguments["factor"], constant(1.0)))
    amplitude = apply("sqrt", constant(1.0) + stretch / apply("log", arguments["original"]))
    return Spectrum(setting.theta / factor, amplitude)


def _llama3(setting: Setting, arguments: Mapping[str, Value]) -> Spectrum:
    low, high = arguments["low"], arguments["high"]
    turns = arguments["original"] * setting.theta / constant(2 * math.pi)
    return Spectrum(_slowed(_clamped((high - turns) / (high - low)), arguments["factor"], setting.theta))


SCALINGS: dict[str, ScalingKind] = {
    "linear": ScalingKind(("factor",), {}, _linear),
    "ntk": ScalingKind(("factor",), {}, _ntk),
    "yarn": ScalingKind(("factor", "original", "beta_fast", "beta_slow"), {"beta_fast": 32.0, "beta_slow": 1.0}, _yarn),
    "longrope": ScalingKind(("factors", "original", "factor"), {"factor": 1.0}, _longrope),
    "llama3": ScalingKind(("factor", "original", "low", "high"), {"low": 1.0, "high": 4.0}, _llama3),
}
