"""Operations on a list of integers: maps, filters, slices, order, reductions, checks, conversions, recursion."""

from cispo.tasks.integer_operations import DIGIT, MIDDLE
from cispo.tasks.operations import Operation, operation

FEW = (1, 2, 3)


def not_empty(xs: list[int]) -> bool:
    return len(xs) > 0


def at_least_two(xs: list[int]) -> bool:
    return len(xs) > 1


MAPS: tuple[Operation, ...] = (
    operation(
        "add_each", "list maps", "ints -> ints", "[x + $c for x in $a]",
        "add $c to each number", "increase each number by $c", "add $c to all of $a", c=DIGIT,
    ),
    operation(
        "multiply_each", "list maps", "ints -> ints", "[x * $c for x in $a]",
        "multiply each number by $c", "take each number times $c", "multiply all of $a by $c", c=DIGIT,
    ),
    operation(
        "square_each", "list maps", "ints -> ints", "[x * x for x in $a]",
        "square each number", "square all of $a", "replace each number by its square",
    ),
    operation(
        "negate_each", "list maps", "ints -> ints", "[-x for x in $a]",
        "negate each number", "flip the sign of each number", "negate all of $a",
    ),
    operation(
        "modulo_each", "list maps", "ints -> ints", "[x % $c for x in $a]",
        "take each number modulo $c", "take all of $a modulo $c", c=DIGIT,
    ),
    operation(
        "cap_each", "list maps", "ints -> ints", "[min(x, $c) for x in $a]",
        "cap each number at $c", "limit all of $a to at most $c", c=MIDDLE,
    ),
    operation(
        "add_index", "list maps", "ints -> ints", "[x + i for i, x in enumerate($a)]",
        "add its index to each number", "add the index to each of $a",
    ),
    operation(
        "pair_sums", "list maps", "ints -> ints", "[x + y for x, y in zip($a, $a[1:])]",
        "add each two neighbours", "list the sums of neighbours",
    ),
    operation(
        "no_negatives", "list maps", "ints -> ints", "[x if x > 0 else 0 for x in $a]",
        "replace negative numbers by 0", "set each negative number to 0",
    ),
    operation(
        "running_totals", "loops", "ints -> ints",
        "r = 0\n$u = []\nfor x in $a:\n    r += x\n    $u.append(r)\n$u",
        "list the running totals", "take the running sums of $a",
    ),
    operation(
        "add_extra", "list maps", "ints, int -> ints", "[x + $b for x in $a]",
        "add $b to each number", "increase each number by $b",
    ),
)

FILTERS: tuple[Operation, ...] = (
    operation(
        "keep_above", "list filters", "ints -> ints", "[x for x in $a if x > $c]",
        "keep numbers above $c", "keep those of $a above $c", "drop all not above $c", c=MIDDLE,
    ),
    operation(
        "keep_below", "list filters", "ints -> ints", "[x for x in $a if x < $c]",
        "keep numbers below $c", "keep those of $a below $c", "drop all not below $c", c=MIDDLE,
    ),
    operation(
        "drop_number", "list filters", "ints -> ints", "[x for x in $a if x != $c]",
        "drop each $c", "remove every $c", "remove $c from $a", c=(0, 1, 2, 3), inputs="close",
    ),
    operation(
        "keep_even", "list filters", "ints -> ints", "[x for x in $a if x % 2 == 0]",
        "keep the even numbers", "keep even numbers of $a", "drop the odd numbers",
    ),
    operation(
        "keep_above_extra", "list filters", "ints, int -> ints", "[x for x in $a if x > $b]",
        "keep numbers above $b", "keep all of $a above $b",
    ),
    operation(
        "unique", "loops", "ints -> ints",
        "$u = []\nfor x in $a:\n    if x not in $u:\n        $u.append(x)\n$u",
        "drop repeats", "keep the first of equal numbers", inputs="close",
    ),
    operation(
        "positive_loop", "loops", "ints -> ints",
        "$u = []\nfor x in $a:\n    if x > 0:\n        $u.append(x)\n$u",
        "collect the positive numbers in a loop", "loop and keep the positive numbers",
    ),
)

SLICES: tuple[Operation, ...] = (
    operation("take_first", "list slices", "ints -> ints", "$a[:$c]", "keep the first $c", "take the first $c", c=FEW),
    operation("drop_first", "list slices", "ints -> ints", "$a[$c:]", "drop the first $c", "skip the first $c", c=FEW),
    operation(
        "every_second", "list slices", "ints -> ints", "$a[::2]",
        "take every second number", "keep even positions",
    ),
    operation("inner", "list slices", "ints -> ints", "$a[1:-1]", "drop first and last", "cut off both ends"),
    operation(
        "take_first_extra", "list slices", "ints, int -> ints", "$a[:$b]",
        "keep the first $b", "take the first $b", extra=(0, 1, 2, 3, 4),
    ),
)

ORDER: tuple[Operation, ...] = (
    operation("ascending", "list order", "ints -> ints", "sorted($a)", "sort $a", "put in ascending order", "sort up"),
    operation(
        "descending", "list order", "ints -> ints", "sorted($a, reverse=True)",
        "sort down", "put in descending order", "sort $a from high to low",
    ),
    operation("reverse", "list order", "ints -> ints", "$a[::-1]", "reverse $a", "turn $a around", "reverse the order"),
    operation(
        "rotate", "list order", "ints -> ints", "$a[$c:] + $a[:$c]",
        "rotate left by $c", "move the first $c to the end", c=FEW,
    ),
    operation(
        "distinct_sorted", "list order", "ints -> ints", "sorted(set($a))",
        "sort and drop repeats", "sort the distinct numbers", inputs="close",
    ),
    operation("append", "list building", "ints -> ints", "$a + [$c]", "append $c", "add $c at the end", c=DIGIT),
    operation(
        "prepend", "list building", "ints -> ints", "[$c] + $a",
        "put $c in front", "add $c at the start", c=DIGIT,
    ),
    operation(
        "append_sum", "list building", "ints -> ints", "$a + [sum($a)]", "append the sum", "add its sum at the end"
    ),
    operation(
        "mirror", "list building", "ints -> ints", "$a + $a[::-1]", "mirror the list", "append its reverse"
    ),
)

REDUCTIONS: tuple[Operation, ...] = (
    operation("total", "list reductions", "ints -> int", "sum($a)", "sum $a", "add all numbers", "find the total"),
    operation(
        "largest", "list reductions", "ints -> int", "max($a)",
        "find the maximum", "take the largest number", "pick the maximum of $a", domain=not_empty,
    ),
    operation(
        "smallest", "list reductions", "ints -> int", "min($a)",
        "find the minimum", "take the smallest number", "pick the minimum of $a", domain=not_empty,
    ),
    operation("length", "list reductions", "ints -> int", "len($a)", "count the numbers", "find the length of $a"),
    operation(
        "first", "list reductions", "ints -> int", "$a[0]", "take the first number", "pick the first of $a",
        domain=not_empty,
    ),
    operation(
        "last", "list reductions", "ints -> int", "$a[-1]", "take the last number", "pick the last of $a",
        domain=not_empty,
    ),
    operation(
        "spread", "list reductions", "ints -> int", "max($a) - min($a)",
        "subtract minimum from maximum", "find the spread of $a", domain=not_empty,
    ),
    operation(
        "second_largest", "list reductions", "ints -> int", "sorted($a)[-2]",
        "find the second largest", "take the second largest number", domain=at_least_two,
    ),
    operation(
        "count_number", "list reductions", "ints -> int", "$a.count($c)",
        "count how often $c occurs", "count the number $c", c=(0, 1, 2, 3), inputs="close",
    ),
    operation(
        "count_above", "list reductions", "ints -> int", "len([x for x in $a if x > $c])",
        "count numbers above $c", "count those of $a above $c", c=MIDDLE,
    ),
    operation(
        "sum_squares", "list reductions", "ints -> int", "sum([x * x for x in $a])",
        "sum the squares", "add the squares of all numbers",
    ),
    operation(
        "mean", "list reductions", "ints -> int", "sum($a) // len($a)",
        "find the floor mean", "average $a and round down", domain=not_empty,
    ),
    operation(
        "count_distinct", "list reductions", "ints -> int", "len(set($a))",
        "count the distinct numbers", "count different numbers of $a", inputs="close",
    ),
    operation(
        "product", "loops", "ints -> int", "$u = 1\nfor x in $a:\n    $u *= x\n$u",
        "multiply all numbers", "take the product of $a",
    ),
    operation(
        "recursive_total", "recursion", "ints -> int", "if not $a:\n    return 0\nreturn $a[0] + $f($a[1:])",
        "sum by recursion", "add all numbers by recursion", is_recursive=True,
    ),
)

LIST_CHECKS: tuple[Operation, ...] = (
    operation(
        "all_even", "list checks", "ints -> bool", "all([x % 2 == 0 for x in $a])",
        "check if all are even", "test if each number is even", inputs="evens",
    ),
    operation(
        "any_above", "list checks", "ints -> bool", "any([x > $c for x in $a])",
        "check if any is above $c", "test if some number is above $c", c=(12, 13, 14, 15),
    ),
    operation(
        "is_sorted", "list checks", "ints -> bool", "$a == sorted($a)",
        "check if $a is sorted", "test for ascending order", inputs="ordered",
    ),
    operation(
        "has_number", "list checks", "ints -> bool", "$c in $a",
        "check if $c occurs", "test if $a has $c", c=(0, 1, 2, 3), inputs="close",
    ),
    operation(
        "is_mirrored", "list checks", "ints -> bool", "$a == $a[::-1]",
        "check if $a reads the same reversed", "test for a palindrome", inputs="mirrored",
    ),
)

LIST_CONVERSIONS: tuple[Operation, ...] = (
    operation(
        "join_numbers", "conversions", "ints -> str", "'$c'.join([str(x) for x in $a])",
        "join with $c as text", "write $a as text with $c between", c=("-", "+", "/"),
    ),
    operation(
        "text_each", "conversions", "ints -> words", "[str(x) for x in $a]",
        "turn each number into text", "list all of $a as text",
    ),
    operation(
        "by_position", "dict building", "ints -> dict", "{str(i): x for i, x in enumerate($a)}",
        "map index text to number", "build a dict from index text to number",
    ),
    operation(
        "number_squares", "dict building", "ints -> dict", "{str(x): x * x for x in $a}",
        "map number text to its square", "build a dict from number text to square",
    ),
)

LIST_OPERATIONS = MAPS + FILTERS + SLICES + ORDER + REDUCTIONS + LIST_CHECKS + LIST_CONVERSIONS
