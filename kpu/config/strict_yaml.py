"""The one reader of YAML: what no configuration needs, and what only costs time and memory, is refused."""

from typing import Any, Final

import yaml

MOST_BYTES: Final = 512 << 10
MOST_DEPTH: Final = 32
MOST_NODES: Final = 100_000
_INTEGER_BITS: Final = 64


def parse_yaml(raw: bytes | str) -> Any:
    """Parse YAML of plain values; anchors may repeat a part, but not make it large.

    Raises:
        ValueError: no YAML, which the message then begins with, or YAML with a key given twice, a number beyond 64
            bits, or too much of anything.
    """
    if len(raw) > MOST_BYTES:
        raise ValueError(f"expected up to {MOST_BYTES:,} bytes, found {len(raw):,}")
    try:
        loader = yaml.SafeLoader(raw if isinstance(raw, str) else raw.decode())
        root = loader.get_single_node()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"is not YAML: {error}") from None
    except RecursionError:
        raise ValueError(f"expected up to {MOST_DEPTH} levels, found more") from None
    if root is None:
        return None
    _check(root)
    try:
        value = loader.construct_document(root)
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:
        # all but the first where a scalar is tagged, or looks, like a number or a date, and is none
        raise ValueError(f"is not YAML: {error}") from None
    _check_scalars(value)
    return value


def _check(root: Any) -> None:
    """Raise ValueError for keys that come twice, and for more nodes or levels than a configuration has.

    YAML would silently take the last of two keys; it counts a part as often as anchors repeat it.
    """
    nodes, level = 0, [root]
    for _ in range(MOST_DEPTH + 1):
        below = []
        nodes += len(level)
        if nodes > MOST_NODES:
            raise ValueError(f"expected up to {MOST_NODES:,} values, found more; repeat less with anchors")
        for node in level:
            if isinstance(node, yaml.CollectionNode):
                below += [part for child in node.value for part in (child if isinstance(child, tuple) else (child,))]
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
            if len(below) > MOST_NODES:
                break
        if not below:
            return
        level = below
    raise ValueError(f"expected up to {MOST_DEPTH} levels, found more")


def _check_keys(node: yaml.MappingNode) -> None:
    keys = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys:
                line = key.start_mark.line + 1
                raise ValueError(f"line {line}: expected each key once, found {key.value!r} again; remove one")
            keys.add(key.value)


def _check_scalars(value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_scalars(key)
            _check_scalars(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            _check_scalars(item)
    elif isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
        raise ValueError(f"expected numbers of up to {_INTEGER_BITS} bits, found one of {value.bit_length()}")
