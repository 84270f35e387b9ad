"""Reads the rotary embedding of a config.json as transformers 5 and SGLang 0.5.23 do.

Published folders have `rope_theta` and `rope_scaling` at the top level; transformers 5 writes both into
`rope_parameters`. A folder is refused if its fields contradict each other, or if transformers and SGLang would compute
different numbers from it. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from icrl_megatron.utils.errors import ConfigError

DEFAULT_THETA = 10_000.0
"""transformers' default if config.json has no rope_theta."""
_PLAIN = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_YARN = {
    *_PLAIN,
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "attn_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
}
_SAME = 1e-6
"""Relative difference below which two attention factors count as equal."""


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): low frequencies are divided by `factor`, high frequencies are kept."""

    factor: float
    original_positions: int
    """Positions that the model was pretrained on."""
    attention_factor: float
    """Factor on cosines and sines, so attention logits are multiplied by its square."""
    beta_fast: float = 32.0
    """Dimensions with more turns than this within `original_positions` keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions with fewer turns than this have their frequency divided by `factor`; dimensions in between are
    blended."""
    truncate: bool = True
    """Round the ends of the ramp to whole dimensions."""

    @property
    def positions(self) -> int:
        """Longest sequence that the scaling supports."""
        return int(self.original_positions * self.factor)


@dataclass(frozen=True)
class Rope:
    """Base frequency and scaling; `yarn` is None for the plain rotary embedding."""

    theta: float
    yarn: Yarn | None


def read_rope(raw: dict[str, Any], max_positions: int, path: Path) -> Rope:
    """`raw` holds the fields of the config.json at `path`. Raises ConfigError naming the field, its value and the
    remedy."""
    name, fields = _section(raw, path)
    kind = _kind(name, fields, path)
    _known(name, fields, kind, path)
    theta = _theta(raw, name, fields, path)
    if kind == "default":
        return Rope(theta, None)
    if theta <= 1:
        raise ConfigError(f"{path}: rope_theta={theta:g}: YaRN needs a base above 1")
    return Rope(theta, _yarn(name, fields, max_positions, path))


def _section(raw: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """The name and contents of the section in use. In transformers, rope_scaling replaces all of rope_parameters
    including its rope_theta, so a file may have both only if they are equal."""
    found = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{path}: {name}={value!r}: expected an object or null; see docs/MODELS.md")
        if value:
            found[name] = value
    if len(found) == 2 and _spelled(found["rope_scaling"]) != _spelled(found["rope_parameters"]):
        raise ConfigError(
            f"{path}: rope_scaling={found['rope_scaling']} and rope_parameters={found['rope_parameters']} contradict "
            "each other; delete the wrong one"
        )
    return next(iter(found.items()), ("rope_parameters", {}))


def _spelled(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with `rope_type` instead of its old name, `type`."""
    rest = {k: v for k, v in fields.items() if k != "type"}
    return {"rope_type": fields.get("type", "default"), **rest}


def _kind(name: str, fields: dict[str, Any], path: Path) -> str:
    given = {key: fields[key] for key in ("rope_type", "type") if key in fields}
    if len(given) == 2 and given["rope_type"] != given["type"]:
        raise ConfigError(
            f"{path}: {name}.rope_type={given['rope_type']!r} and {name}.type={given['type']!r} contradict each other; "
            "delete the wrong one"
        )
    key, kind = next(iter(given.items()), ("rope_type", "default"))
    if kind not in ("default", "yarn"):
        raise ConfigError(
            f"{path}: {name}.{key}={kind!r} is not supported, only default and yarn are; use a folder with one of these"
        )
    return str(kind)


def _known(name: str, fields: dict[str, Any], kind: str, path: Path) -> None:
    for key, value in fields.items():
        if key not in (_YARN if kind == "yarn" else _PLAIN):
            raise ConfigError(
                f"{path}: {name}.{key}={value!r} is unknown for rope_type {kind!r}; delete it if the model was trained "
                "without it"
            )
    factor = fields.get("partial_rotary_factor", 1.0)
    if not _is_number(factor) or factor != 1:
        raise ConfigError(
            f"{path}: {name}.partial_rotary_factor={factor!r} is not supported: only whole heads are rotated; delete "
            "it if it should be 1"
        )


def _theta(raw: dict[str, Any], name: str, fields: dict[str, Any], path: Path) -> float:
    given = {}
    if "rope_theta" in fields:
        given[f"{name}.rope_theta"] = fields["rope_theta"]
    if raw.get("rope_theta") is not None or ("rope_theta" in raw and not given):
        given["rope_theta"] = raw["rope_theta"]
    for key, value in given.items():
        if not _is_number(value) or value <= 0:
            raise ConfigError(f"{path}: {key}={value!r}: expected a positive number; see the model's card")
    if len(set(given.values())) > 1:
        listed = " and ".join(f"{key}={value:g}" for key, value in given.items())
        raise ConfigError(f"{path}: {listed} contradict each other; delete the wrong one")
    return float(next(iter(given.values()), DEFAULT_THETA))


def _yarn(name: str, fields: dict[str, Any], max_positions: int, path: Path) -> Yarn:
    def number(key: str, default: float, least: float) -> float:
        value = fields.get(key, default)
        if not _is_number(value) or value < least:
            raise ConfigError(f"{path}: {name}.{key}={value!r}: expected a number of at least {least:g}")
        return float(value)

    if "factor" not in fields:
        raise ConfigError(f"{path}: {name}.factor is missing; YaRN needs it, e.g. 4.0")
    factor = number("factor", 1.0, 1.0)
    original = fields.get("original_max_position_embeddings", max_positions)
    if type(original) is not int or original < 1:
        raise ConfigError(f"{path}: {name}.original_max_position_embeddings={original!r}: expected a positive integer")
    truncate = fields.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"{path}: {name}.truncate={truncate!r}: expected true or false")
    fast, slow = number("beta_fast", 32.0, 1e-6), number("beta_slow", 1.0, 1e-6)
    if fast < slow:
        raise ConfigError(f"{path}: {name}.beta_fast={fast:g} is below beta_slow={slow:g}; swap them")
    return Yarn(factor, original, _attention_factor(name, fields, factor, path), fast, slow, truncate)


def _attention_factor(name: str, fields: dict[str, Any], factor: float, path: Path) -> float:
    """transformers uses `attention_factor`; SGLang uses `attn_factor` times the default (of `factor`, or of mscale).
    Each ignores the other's field, so the two must agree."""

    def positive(key: str) -> float | None:
        value = fields.get(key)
        if value is None and (key not in fields or key != "attn_factor"):
            return None
        if not _is_number(value) or value <= 0:
            raise ConfigError(f"{path}: {name}.{key}={value!r}: expected a positive number")
        return float(value)

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0

    above, below = positive("mscale"), positive("mscale_all_dim")
    if (above is None) != (below is None):
        raise ConfigError(f"{path}: {name}.mscale={above} and {name}.mscale_all_dim={below}: give both, or neither")
    usual = scale(1.0) if above is None or below is None else scale(above) / scale(below)
    attention, times = positive("attention_factor"), positive("attn_factor")
    of_transformers = usual if attention is None else attention
    of_sglang = usual if times is None else usual * times
    if not math.isclose(of_transformers, of_sglang, rel_tol=_SAME):
        key = "attention_factor" if attention is not None else "attn_factor"
        raise ConfigError(
            f"{path}: {name}.{key}={fields[key]!r}: transformers takes {of_transformers:.9g} (attention_factor) and "
            f"SGLang {of_sglang:.9g} (attn_factor x {usual:.9g}) from this. To keep the first, set attn_factor="
            f"{of_transformers / usual:.9g}; to keep the second, set attention_factor={of_sglang:.9g} in {name}"
        )
    return of_transformers


def _is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number that a float can hold; unlike in Python, true is not a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300
