"""Where two dumps of a configuration differ. Pure."""

from typing import Any


def differences_at(key: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Return (key, old value, new value) of every key that differs, below a key with these two values.

    old, new: values as model_dump gives them. A key that one side lacks counts as None.

    >>> differences_at("learner", {"threads": 1, "lora": {"rank": 0}}, {"threads": 1, "lora": {"rank": 8}})
    [('learner.lora.rank', 0, 8)]
    """
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for name in sorted(old.keys() | new.keys())
            for difference in differences_at(f"{key}.{name}", old.get(name), new.get(name))
        ]
    return [] if old == new else [(key, old, new)]
