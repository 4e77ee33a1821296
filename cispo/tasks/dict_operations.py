"""Operations on a dict from text to integer."""

from cispo.tasks.integer_operations import DIGIT, MIDDLE
from cispo.tasks.operations import Operation, operation
from cispo.tasks.text_operations import LETTER


def has_keys(d: dict[str, int]) -> bool:
    return len(d) > 0


DICT_MAPS: tuple[Operation, ...] = (
    operation(
        "add_values", "dict maps", "dict -> dict", "{k: v + $c for k, v in $a.items()}",
        "add $c to each value", "increase all values by $c", c=DIGIT,
    ),
    operation(
        "multiply_values", "dict maps", "dict -> dict", "{k: v * $c for k, v in $a.items()}",
        "multiply each value by $c", "take all values times $c", c=DIGIT,
    ),
    operation(
        "negate_values", "dict maps", "dict -> dict", "{k: -v for k, v in $a.items()}",
        "negate each value", "flip the sign of all values",
    ),
)

DICT_FILTERS: tuple[Operation, ...] = (
    operation(
        "values_above", "dict filters", "dict -> dict", "{k: v for k, v in $a.items() if v > $c}",
        "keep values above $c", "keep pairs with a value above $c", c=MIDDLE,
    ),
    operation(
        "even_values", "dict filters", "dict -> dict", "{k: v for k, v in $a.items() if v % 2 == 0}",
        "keep even values", "keep pairs with an even value",
    ),
    operation(
        "keys_with", "dict filters", "dict -> dict", "{k: v for k, v in $a.items() if '$c' in k}",
        "keep keys with the letter $c", "keep pairs whose key has the letter $c", c=LETTER,
    ),
    operation(
        "drop_key", "dict filters", "dict -> dict", "{k: v for k, v in $a.items() if k != '$c'}",
        "drop the key $c", "remove the key $c", c=LETTER,
    ),
)

DICT_READS: tuple[Operation, ...] = (
    operation("values", "dict reads", "dict -> ints", "list($a.values())", "list the values", "take all values of $a"),
    operation(
        "sorted_values", "dict reads", "dict -> ints", "sorted($a.values())",
        "list the values sorted", "sort the values of $a",
    ),
    operation(
        "sorted_keys", "dict reads", "dict -> words", "sorted($a)",
        "list the keys sorted", "sort the keys of $a",
    ),
    operation(
        "keys_above", "dict reads", "dict -> words", "[k for k in $a if $a[k] > $c]",
        "list keys with a value above $c", "find keys valued above $c", c=MIDDLE,
    ),
    operation(
        "value_sum", "dict reductions", "dict -> int", "sum($a.values())", "sum the values", "add all values of $a"
    ),
    operation("key_count", "dict reductions", "dict -> int", "len($a)", "count the keys", "count the pairs of $a"),
    operation(
        "look_up", "dict reductions", "dict -> int", "$a.get('$c', $e)",
        "get the value of key $c or else $e", "look up key $c, or $e if missing", c=LETTER, e=DIGIT,
    ),
    operation(
        "count_values", "dict reductions", "dict -> int", "len([k for k in $a if $a[k] > $c])",
        "count values above $c", "count keys valued above $c", c=MIDDLE,
    ),
    operation(
        "best_key", "dict reductions", "dict -> str", "max($a, key=$a.get)",
        "find the key with the largest value", "pick the key of the maximum", domain=has_keys,
    ),
)

DICT_OPERATIONS = DICT_MAPS + DICT_FILTERS + DICT_READS
