"""What tells two orders of samples apart, in words."""

from collections.abc import Mapping
from typing import Any

from megagate.config.blend_text import PERIOD

_KEYS = {"seed": "train.seed", "seq_len": "train.seq_len", "permutation": "the version of the order"}


def order_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What changed between two orders, as `TrainLoader.order_at` describes them: a key, a data set by its name, or the weights.

    A data set is known by its fingerprint: a folder may have moved. Empty where neither says more than its hash.
    """
    found = [f"{name} {there[key]} there, {here[key]} here" for key, name in _KEYS.items() if key in there and there[key] != here[key]]
    if "weights" not in there:
        return found
    old, new = _data_sets(there), _data_sets(here)
    of_names = {name: fingerprint for fingerprint, name in old.items()}
    other = {name: (of_names[name], fingerprint) for fingerprint, name in new.items() if of_names.get(name, fingerprint) != fingerprint}
    found += [f"{name} holds other tokens, fingerprint {one[:12]} there, {two[:12]} here" for name, (one, two) in other.items()]
    found += [f"{name} only there" for fingerprint, name in old.items() if fingerprint not in new and name not in other]
    found += [f"{name} only here" for fingerprint, name in new.items() if fingerprint not in old and name not in other]
    if old.keys() == new.keys() and _slots(there) != _slots(here):
        found.append(f"weights {_in_words(there)} there, {_in_words(here)} here")
    return found


def _data_sets(order: Mapping[str, Any]) -> dict[str, str]:
    """Names by fingerprint."""
    return {one["fingerprint"]: one["name"] or "data.path" for part in order["weights"] for one in part["sets"]}


def _slots(order: Mapping[str, Any]) -> list[Any]:
    return [(part["from"], [(one["fingerprint"], one["slots"]) for one in part["sets"]]) for part in order["weights"]]


def _in_words(order: Mapping[str, Any]) -> str:
    parts = []
    for part in order["weights"]:
        named = " ".join(f"{one['slots'] / PERIOD:.4g} {one['name']}" for one in part["sets"])
        parts.append(f"from {part['from']} {named}" if part["from"] else named)
    return f"`{' '.join(parts)}`"
