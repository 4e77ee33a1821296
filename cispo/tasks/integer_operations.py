"""Operations on one integer or two: arithmetic, digits, conditionals, checks, ranges, recursion, conversions."""

from cispo.tasks.operations import Operation, operation

DIGIT = tuple(range(2, 10))
MIDDLE = tuple(range(4, 13))


def not_negative(n: int) -> bool:
    return n >= 0


def up_to_ten(n: int) -> bool:
    return 0 <= n <= 10


def up_to_twelve(n: int) -> bool:
    return 0 <= n <= 12


ARITHMETIC: tuple[Operation, ...] = (
    operation("add", "arithmetic", "int -> int", "$a + $c", "add $c", "add $c to $a", "increase $a by $c", c=DIGIT),
    operation(
        "subtract", "arithmetic", "int -> int", "$a - $c",
        "subtract $c", "take $c away from $a", "decrease $a by $c", c=DIGIT,
    ),
    operation(
        "multiply", "arithmetic", "int -> int", "$a * $c",
        "multiply by $c", "multiply $a by $c", "take $c times $a", c=DIGIT,
    ),
    operation(
        "divide", "arithmetic", "int -> int", "$a // $c",
        "divide $a by $c and round down", "floor divide $a by $c", "do a whole division by $c", c=DIGIT,
    ),
    operation(
        "remainder", "arithmetic", "int -> int", "$a % $c",
        "take $a modulo $c", "find the remainder of $a by $c", "take the remainder modulo $c", c=DIGIT,
    ),
    operation("negate", "arithmetic", "int -> int", "-$a", "negate $a", "flip the sign", "change the sign of $a"),
    operation("square", "arithmetic", "int -> int", "$a * $a", "square $a", "multiply $a by itself", "take the square"),
    operation("cube", "arithmetic", "int -> int", "$a ** 3", "cube $a", "take the cube of $a", "raise $a to the third"),
    operation("absolute", "arithmetic", "int -> int", "abs($a)", "take the absolute value", "make $a not negative"),
    operation(
        "subtract_from", "arithmetic", "int -> int", "$c - $a",
        "subtract $a from $c", "take $c minus $a", "find $c minus $a", c=DIGIT,
    ),
    operation(
        "triangle", "arithmetic", "int -> int", "$a * ($a + 1) // 2",
        "take the triangular number of $a", "find the triangle number", domain=not_negative,
    ),
    operation("cap", "arithmetic", "int -> int", "min($a, $c)", "cap $a at $c", "limit $a to at most $c", c=MIDDLE),
)

TWO_NUMBERS: tuple[Operation, ...] = (
    operation("add_two", "two numbers", "int, int -> int", "$a + $b", "add $b to $a", "take $a plus $b"),
    operation(
        "subtract_two", "two numbers", "int, int -> int", "$a - $b", "subtract $b from $a", "take $a minus $b"
    ),
    operation("multiply_two", "two numbers", "int, int -> int", "$a * $b", "multiply $a by $b", "take $a times $b"),
    operation(
        "distance", "two numbers", "int, int -> int", "abs($a - $b)",
        "find the distance of $a and $b", "take the absolute difference of $a and $b",
    ),
    operation(
        "larger", "two numbers", "int, int -> int", "max($a, $b)",
        "take the larger of $a and $b", "pick the maximum of $a and $b",
    ),
)

CONDITIONALS: tuple[Operation, ...] = (
    operation(
        "collatz", "conditionals", "int -> int", "$a // 2 if $a % 2 == 0 else $a * 3 + 1",
        "halve $a if even, else triple it and add 1", "do one collatz step",
    ),
    operation(
        "at_least", "conditionals", "int -> int", "if $a < $c:\n    $a = $c\n$a",
        "use $c if $a is below $c", "raise $a to at least $c", c=MIDDLE,
    ),
    operation(
        "reduce_big", "conditionals", "int -> int", "if $a > $c:\n    $a -= $c\n$a",
        "subtract $c if $a is above $c", "take off $c when $a is above $c", c=MIDDLE,
    ),
    operation(
        "odd_up", "conditionals", "int -> int", "if $a % 2 == 1:\n    $a += $c\n$a",
        "add $c if $a is odd", "increase $a by $c when odd", c=DIGIT,
    ),
    operation(
        "even_half", "conditionals", "int -> int", "if $a % 2 == 0:\n    $a //= 2\n$a",
        "halve $a if it is even", "halve $a when even",
    ),
    operation(
        "sign", "conditionals", "int -> int", "1 if $a > 0 else -1 if $a < 0 else 0",
        "find the sign of $a as 1, 0 or -1", "return the sign, -1, 0 or 1",
    ),
    operation(
        "not_below_zero", "conditionals", "int -> int", "0 if $a < 0 else $a",
        "use 0 if $a is negative", "replace a negative $a by 0",
    ),
    operation(
        "parity_word", "labels", "int -> str", "'even' if $a % 2 == 0 else 'odd'",
        "say even or odd", "name $a even or odd",
    ),
    operation(
        "size_word", "labels", "int -> str", "'big' if $a > $c else 'small'",
        "say big if $a is above $c, else small", "name $a big above $c, else small", c=MIDDLE,
    ),
)

CHECKS: tuple[Operation, ...] = (
    operation("is_even", "number checks", "int -> bool", "$a % 2 == 0", "check if $a is even", "test for even"),
    operation(
        "is_above", "number checks", "int -> bool", "$a > $c",
        "check if $a is above $c", "test if $a is more than $c", c=MIDDLE,
    ),
    operation(
        "is_below", "number checks", "int -> bool", "$a < $c",
        "check if $a is below $c", "test if $a is less than $c", c=MIDDLE,
    ),
    operation(
        "is_between", "number checks", "int -> bool", "$c <= $a <= $e",
        "check if $a is from $c to $e", "test if $a lies in $c to $e", c=(1, 2, 3, 4), e=(8, 9, 10, 12, 15),
    ),
)

DIGITS: tuple[Operation, ...] = (
    operation(
        "digit_sum", "digits", "int -> int", "sum([int(ch) for ch in str($a)])",
        "add the digits of $a", "take the digit sum", domain=not_negative, inputs="digits",
    ),
    operation(
        "digit_count", "digits", "int -> int", "len(str($a))",
        "count the digits", "count the digits of $a", domain=not_negative, inputs="digits",
    ),
    operation(
        "digit_reverse", "digits", "int -> int", "int(str($a)[::-1])",
        "reverse the digits", "read the digits of $a backwards", domain=not_negative, inputs="digits",
    ),
    operation(
        "digit_list", "digits", "int -> ints", "[int(ch) for ch in str($a)]",
        "list the digits", "split $a into digits", domain=not_negative, inputs="digits",
    ),
)

RANGES: tuple[Operation, ...] = (
    operation(
        "below", "ranges", "int -> ints", "list(range($a))",
        "list the numbers below $a", "count from 0 up to below $a", domain=up_to_twelve, inputs="small",
    ),
    operation(
        "one_to", "ranges", "int -> ints", "list(range(1, $a + 1))",
        "list 1 to $a", "count from 1 to $a", domain=up_to_twelve, inputs="small",
    ),
    operation(
        "countdown", "ranges", "int -> ints", "list(range($a, 0, -1))",
        "count down from $a to 1", "list $a down to 1", domain=up_to_twelve, inputs="small",
    ),
    operation(
        "multiples", "ranges", "int -> ints", "[i * $c for i in range($a)]",
        "list multiples of $c from 0, as many as $a", "list as many multiples of $c as $a says",
        domain=up_to_twelve, inputs="small", c=DIGIT,
    ),
    operation(
        "divisors", "ranges", "int -> ints", "[i for i in range(1, $a + 1) if $a % i == 0]",
        "list the divisors", "list all that divide $a", domain=lambda n: 0 <= n <= 200,
    ),
)

LOOPS: tuple[Operation, ...] = (
    operation(
        "square_sum", "loops", "int -> int", "$u = 0\nfor i in range($a):\n    $u += i * i\n$u",
        "add the squares below $a", "sum all squares of numbers below $a", domain=up_to_twelve, inputs="small",
    ),
    operation(
        "even_sum", "loops", "int -> int", "$u = 0\nfor i in range(0, $a, 2):\n    $u += i\n$u",
        "add the even numbers below $a", "sum all even numbers below $a", domain=lambda n: 0 <= n <= 40,
    ),
    operation(
        "doubling", "loops", "int -> int", "$u = $c\nfor i in range($a):\n    $u *= 2\n$u",
        "double $c as often as $a says", "start at $c and double as often as $a",
        domain=up_to_twelve, inputs="small", c=DIGIT,
    ),
)

RECURSION: tuple[Operation, ...] = (
    operation(
        "factorial", "recursion", "int -> int", "if $a < 2:\n    return 1\nreturn $a * $f($a - 1)",
        "take the factorial", "find the factorial of $a", domain=up_to_ten, inputs="small",
        is_recursive=True,
    ),
    operation(
        "fibonacci", "recursion", "int -> int", "if $a < 2:\n    return $a\nreturn $f($a - 1) + $f($a - 2)",
        "take the fibonacci number", "find the fibonacci number at $a", domain=up_to_twelve, inputs="small",
        is_recursive=True,
    ),
    operation(
        "halvings", "recursion", "int -> int", "if $a < 2:\n    return 0\nreturn 1 + $f($a // 2)",
        "count the halvings of $a down to 1", "count how often $a can be halved", domain=not_negative,
        is_recursive=True,
    ),
    operation(
        "power", "recursion", "int -> int", "if $a == 0:\n    return 1\nreturn $c * $f($a - 1)",
        "take $c to the power of $a by recursion", "raise $c to the power of $a by recursion",
        domain=up_to_ten, inputs="small", is_recursive=True, c=(2, 3, 4),
    ),
)

CONVERSIONS: tuple[Operation, ...] = (
    operation("as_text", "conversions", "int -> str", "str($a)", "turn $a into text", "write $a as text"),
    operation(
        "repeat_letter", "conversions", "int -> str", "'$c' * $a",
        "write the letter $c as often as $a says", "repeat the letter $c as often as $a",
        domain=up_to_twelve, inputs="small", c=tuple("abcxz"),
    ),
)

INTEGER_OPERATIONS = (
    ARITHMETIC + TWO_NUMBERS + CONDITIONALS + CHECKS + DIGITS + RANGES + LOOPS + RECURSION + CONVERSIONS
)
