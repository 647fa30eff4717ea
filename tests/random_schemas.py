"""Random JSON schemas, bounded so that random models finish texts of them, mostly."""

from __future__ import annotations

import random
from typing import Any

WORDS = ["name", "id", "tags", "a b", 'q"uote', "é", "x" * 20, "", "$ref", "value/2"]


def random_schema(rng: random.Random) -> dict[str, Any]:
    """A schema of an object, with definitions that it may refer to, one of them recursive."""
    schema = _object(rng, 3)
    if rng.random() < 0.3:
        schema["$defs"] = {
            "leaf": _leaf(rng),
            "tree": {
                "type": "object",
                "properties": {"kid": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}},
                "required": ["kid"],
                "additionalProperties": False,
            },
        }
        for name in rng.sample(["leaf", "tree"], rng.randint(1, 2)):
            schema["properties"][f"my {name}"] = {"$ref": f"#/$defs/{name}"}
            schema["required"].append(f"my {name}")
    return schema


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth == 0 or rng.random() < 0.5:
        return _leaf(rng)
    return rng.choice([_object, _array, _union])(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    if rng.random() < 0.3:
        kinds = [_any(rng, depth) for _ in range(2)]
        return {"type": "array", "prefixItems": kinds, "items": False, "minItems": 2}
    most = least + rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth), "minItems": least, "maxItems": most}


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randint(2, 3))]}


def _leaf(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    return rng.choice(
        [
            {"type": "string", "maxLength": rng.randint(0, 8)},
            {"type": "string", "pattern": r"^[a-c]{1,3}-\d{2}$"},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 200)},
            {"type": "integer", "exclusiveMinimum": low, "multipleOf": 5, "maximum": low + 99},
            {"type": "number", "minimum": 0, "maximum": 2.5},
            {"type": ["boolean", "null"]},
            {"enum": rng.sample(["red", 'a"b', 3, None, True, [1, 2], {"k": "v"}], 3)},
            {"const": rng.choice(WORDS)},
        ]
    )
