"""The rules that the value of one configuration key must follow."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """A bound on the value of one key.

    Attributes:
      text: what the value must be, the end of an error message: "must be at least 1".
      holds: value → whether it is so.
    """

    text: str
    holds: Callable[[Any], bool]


def is_number(value: object) -> bool:
    """Whether the value is a finite int or float (a bool is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def at_least(minimum: float) -> Rule:
    """The rule value >= minimum."""
    return Rule(f"must be at least {minimum}", lambda value: is_number(value) and value >= minimum)


def above(bound: float) -> Rule:
    """The rule value > bound."""
    return Rule(f"must be above {bound}", lambda value: is_number(value) and value > bound)


def between(low: float, high: float) -> Rule:
    """The rule low <= value < high."""
    return Rule(f"must be in [{low}, {high})", lambda value: is_number(value) and low <= value < high)


def choice(*names: str) -> Rule:
    """The rule that the value is one of the names."""
    return Rule(f"choose one of {', '.join(names)}", lambda value: value in names)


def choice_or_none(*names: str) -> Rule:
    """The rule that the value is one of the names, or empty."""
    return Rule(f"choose one of {', '.join(names)}, or '' for none", lambda value: value in ("", *names))


def any_of(*names: str) -> Rule:
    """The rule that the value is a sequence of some of the names; it may be empty."""
    return Rule(f"choose any of {', '.join(names)}, as in ({names[0]!r},)", lambda value: all(name in names for name in value))


def mesh_size() -> Rule:
    """The rule of a mesh axis: a positive size, or -1 for all devices that remain."""
    return Rule("must be a positive number of devices, or -1 for all that remain", lambda v: v == -1 or v >= 1)


def pairs(kind: type) -> Rule:
    """The rule that the value is a sequence of (name, finite number) pairs, or of (size, finite number) pairs; it may be empty.

    Args:
      kind: str for names, int for sizes.
    """
    name = "size" if kind is int else "name"

    def holds(value: Any) -> bool:
        return all(
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], kind) and is_number(pair[1]) for pair in value
        )

    return Rule(f"give ({name}, number) pairs, as in [({name}, 1.0), ({name}, 0.5)]", holds)


def options(value: Any) -> bool:
    """Whether the value is a sequence of (name, text) pairs."""
    return all(isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(x, str) for x in pair) for pair in value)


OPTIONS = Rule("give (name, value) pairs of texts, as in (('xla_tpu_scoped_vmem_limit_kib', '65536'),)", options)
NUMBER = Rule("must be a finite number", is_number)
NUMBER_OR_NONE = Rule("must be a finite number, or None", lambda value: value is None or is_number(value))
SIZES = Rule("give positive sizes, as in (512, 128)", lambda v: all(isinstance(x, int) and x > 0 for x in v))
NGRAMS = Rule(
    "give (tokens of an n-gram, rows of its table) pairs, as in ((2, 131072),): two tokens or more, rows in multiples of 128",
    lambda v: (
        all(type(pair) is tuple and len(pair) == 2 and all(type(x) is int for x in pair) for pair in v)
        and all(order >= 2 and rows >= 128 and rows % 128 == 0 for order, rows in v)
        and len(dict(v)) == len(v)
    ),
)
LAYERS = Rule(
    "give (width, activation, bias) of each layer, as in ((512, 'tanh', True),); activations are 'identity' and 'tanh'",
    lambda layers: all(
        isinstance(layer, tuple)
        and len(layer) == 3
        and (type(layer[0]) is int and layer[0] > 0 and layer[1] in ("identity", "tanh") and type(layer[2]) is bool)
        for layer in layers
    ),
)
# Text and switches: ml_collections checks the type, and the code that uses the text checks its content.
ANY = Rule("", lambda value: True)


class Key(NamedTuple):
    """The default of one key and the rule that its value must follow. Rules over several keys stay with the code they serve.

    The default of a key that may be None is its type: it begins as None.
    """

    default: Any
    rule: Rule = ANY
