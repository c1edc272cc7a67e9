"""Rotary positions to and from the configurations of Hugging Face transformers."""

from collections.abc import Mapping
from typing import Any

# Our names of what a kind of scaling takes, and theirs.
SCALING = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "low_frequency": "low_freq_factor",
        "high_frequency": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # theirs must be said
DEFAULT_BASE = 10000.0


def write_rotary(
    base: float, scaling: Mapping[str, Any] | None, head_width: int, base_key: str
) -> dict[str, Any]:
    """Their keys. base_key: what they call the base.

    The keys are those of transformers 4, which 5 reads too. "ntk", which only raises the base, is written so.
    """
    if scaling is None:
        return {base_key: base}
    kind = scaling["kind"]
    if kind == "ntk":
        return {base_key: base * scaling["factor"] ** (head_width / max(1, head_width - 2))}
    names = SCALING[kind]
    written = {names[key]: value for key, value in scaling.items() if key != "kind" and value is not None}
    if "original_max_position_embeddings" in written:
        written["original_max_position_embeddings"] = int(written["original_max_position_embeddings"])
    bands = LLAMA3_BANDS if kind == "llama3" else {}
    return {base_key: base, "rope_scaling": {"rope_type": kind, **bands, **written}}


def read_rotary(config: Mapping[str, Any], base_key: str, share: float) -> dict[str, Any]:
    """`rotary_base` and `rotary_scaling`. share: of a head that is turned where the config does not say.

    Raises ValueError in one line for a share below 1 and a scaling that `model.rotary` does not have.
    """
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    base = given.pop("rope_theta", None) or config.get(base_key) or DEFAULT_BASE
    share = config.get("rotary_pct", config.get("partial_rotary_factor", share))
    share = given.pop("partial_rotary_factor", share)
    if share != 1:
        raise ValueError(f"partial_rotary_factor: {share} has no equal here, where whole heads are turned")
    if kind == "default":
        return {"rotary_base": float(base), "rotary_scaling": None}
    if kind not in SCALING:
        raise ValueError(f"rope_type: {kind} has no equal here; there are {', '.join(SCALING)}")
    if given.pop("truncate", True) is False:
        raise ValueError("truncate: false has no equal here, where yarn's ramp ends at whole numbers")
    names = SCALING[kind]
    if "original_length" in names and given.get(names["original_length"]) is None:
        given[names["original_length"]] = config["max_position_embeddings"]
    scaling = {ours: given.pop(theirs) for ours, theirs in names.items() if given.get(theirs) is not None}
    left = sorted(key for key, value in given.items() if value is not None)
    if left:
        raise ValueError(f"{left[0]}: {given[left[0]]} has no equal here with rope_type {kind}")
    return {"rotary_base": float(base), "rotary_scaling": {"kind": kind, **scaling}}
