"""Operations on text and on lists of words."""

from cispo.tasks.list_operations import FEW
from cispo.tasks.operations import Constant, Operation, operation

LETTER: tuple[Constant, ...] = ("a", "e", "n", "o", "r", "s", "t")
FRESH: tuple[Constant, ...] = ("x", "y", "z")
LENGTH = (2, 3, 4, 5)


def has_text(s: str) -> bool:
    return len(s) > 0


TRANSFORMS: tuple[Operation, ...] = (
    operation("upper", "string transforms", "str -> str", "$a.upper()", "make $a upper case", "turn into capitals"),
    operation("backwards", "string transforms", "str -> str", "$a[::-1]", "reverse $a", "spell $a backwards"),
    operation(
        "repeat", "string transforms", "str -> str", "$a * $c",
        "repeat $a $c times", "write $a $c times", c=LENGTH,
    ),
    operation(
        "replace_letter", "string transforms", "str -> str", "$a.replace('$c', '$e')",
        "replace each letter $c by $e", "change every letter $c to $e", c=LETTER, e=FRESH,
    ),
    operation(
        "sort_letters", "string transforms", "str -> str", "''.join(sorted($a))",
        "sort the letters", "put the letters of $a in order",
    ),
    operation(
        "double_letters", "string transforms", "str -> str", "''.join([ch * $c for ch in $a])",
        "repeat each letter $c times", "write each letter of $a $c times", c=(2, 3),
    ),
    operation(
        "capital_vowels", "string transforms", "str -> str",
        "''.join([ch.upper() if ch in 'aeiou' else ch for ch in $a])",
        "make vowels upper case", "turn vowels into capitals",
    ),
    operation(
        "prefix", "string building", "str -> str", "'$c' + $a",
        "put the letter $c in front", "start $a with the letter $c", c=FRESH,
    ),
    operation(
        "suffix", "string building", "str -> str", "$a + '$c'",
        "append the letter $c", "end $a with the letter $c", c=FRESH,
    ),
    operation(
        "recursive_reverse", "recursion", "str -> str", "if not $a:\n    return ''\nreturn $f($a[1:]) + $a[0]",
        "reverse by recursion", "spell $a backwards by recursion", is_recursive=True,
    ),
)

STRING_FILTERS: tuple[Operation, ...] = (
    operation(
        "head", "string filters", "str -> str", "$a[:$c]",
        "keep the first $c letters", "cut to $c letters", c=FEW,
    ),
    operation("tail", "string filters", "str -> str", "$a[$c:]", "drop the first $c letters", "skip $c letters", c=FEW),
    operation(
        "drop_vowels", "string filters", "str -> str", "''.join([ch for ch in $a if ch not in 'aeiou'])",
        "drop the vowels", "remove all vowels of $a",
    ),
    operation(
        "keep_vowels", "string filters", "str -> str", "''.join([ch for ch in $a if ch in 'aeiou'])",
        "keep the vowels", "keep only the vowels of $a",
    ),
    operation(
        "drop_letter", "string filters", "str -> str", "''.join([ch for ch in $a if ch != '$c'])",
        "remove each letter $c", "drop every letter $c", c=LETTER,
    ),
    operation(
        "unique_letters", "string filters", "str -> str",
        "$u = ''\nfor ch in $a:\n    if ch not in $u:\n        $u += ch\n$u",
        "drop repeated letters", "keep each letter once",
    ),
)

STRING_COUNTS: tuple[Operation, ...] = (
    operation("size", "string counts", "str -> int", "len($a)", "count the letters", "find the length of $a"),
    operation(
        "count_letter", "string counts", "str -> int", "$a.count('$c')",
        "count the letter $c", "count each letter $c in $a", c=LETTER,
    ),
    operation(
        "count_vowels", "string counts", "str -> int", "len([ch for ch in $a if ch in 'aeiou'])",
        "count the vowels", "count the vowels of $a",
    ),
    operation(
        "different_letters", "string counts", "str -> int", "len(set($a))",
        "count different letters", "count the distinct letters of $a",
    ),
    operation(
        "count_words", "string counts", "str -> int", "len($a.split())",
        "count the words", "count the words of $a", inputs="sentence",
    ),
)

STRING_CHECKS: tuple[Operation, ...] = (
    operation(
        "is_palindrome", "string checks", "str -> bool", "$a == $a[::-1]",
        "check for a palindrome", "test if $a reads the same backwards", inputs="palindromes",
    ),
    operation(
        "starts", "string checks", "str -> bool", "$a.startswith('$c')",
        "check if $a starts with letter $c", "test for a first letter $c", c=("a", "e"),
    ),
    operation(
        "has_letter", "string checks", "str -> bool", "'$c' in $a",
        "check if $a has the letter $c", "test if the letter $c occurs", c=LETTER,
    ),
    operation(
        "is_long", "string checks", "str -> bool", "len($a) > $c",
        "check for more than $c letters", "test if $a is longer than $c", c=LENGTH,
    ),
)

STRING_SPLITS: tuple[Operation, ...] = (
    operation("letters", "string splits", "str -> words", "list($a)", "list the letters", "split into letters"),
    operation(
        "split_words", "string splits", "str -> words", "$a.split()",
        "split into words", "list the words of $a", inputs="sentence",
    ),
    operation(
        "alphabet", "string splits", "str -> ints", "[ord(ch) - 96 for ch in $a]",
        "list the letter values with a as 1", "list the alphabet positions",
    ),
    operation(
        "letter_places", "string splits", "str -> ints", "[i for i, ch in enumerate($a) if ch == '$c']",
        "list the indexes of the letter $c", "find all places of the letter $c", c=LETTER,
    ),
    operation(
        "letter_counts", "dict building", "str -> dict", "{ch: $a.count(ch) for ch in $a}",
        "map each letter to its count", "build a dict of letter counts",
    ),
    operation(
        "last_places", "dict building", "str -> dict", "{ch: i for i, ch in enumerate($a)}",
        "map each letter to its last index", "build a dict of last letter indexes",
    ),
)

WORDS: tuple[Operation, ...] = (
    operation(
        "upper_words", "word lists", "words -> words", "[w.upper() for w in $a]",
        "make each word upper case", "turn all words into capitals",
    ),
    operation(
        "reverse_words", "word lists", "words -> words", "[w[::-1] for w in $a]",
        "reverse each word", "spell each word backwards",
    ),
    operation(
        "long_words", "word lists", "words -> words", "[w for w in $a if len(w) > $c]",
        "keep words longer than $c", "keep words of more than $c letters", c=LENGTH,
    ),
    operation("sort_words", "word lists", "words -> words", "sorted($a)", "sort the words", "put words in order"),
    operation(
        "sort_by_length", "word lists", "words -> words", "sorted($a, key=len)",
        "sort words by length", "order the words by length",
    ),
    operation(
        "flip_words", "word lists", "words -> words", "$a[::-1]",
        "reverse the word order", "turn the list around",
    ),
    operation(
        "lengths", "word reductions", "words -> ints", "[len(w) for w in $a]",
        "list the word lengths", "take the length of each word",
    ),
    operation(
        "join_words", "word reductions", "words -> str", "'$c'.join($a)",
        "join with $c", "join the words of $a with $c", c=("-", "+", "/"),
    ),
    operation(
        "initials", "word reductions", "words -> str", "''.join([w[:1] for w in $a])",
        "join the first letters", "join the initials of the words",
    ),
    operation(
        "longest", "word reductions", "words -> str", "max($a, key=len)",
        "find the longest word", "pick the first longest word", domain=lambda ws: len(ws) > 0,
    ),
    operation("count_list", "word reductions", "words -> int", "len($a)", "count the words", "find how many words"),
    operation(
        "all_letters", "word reductions", "words -> int", "sum([len(w) for w in $a])",
        "count all letters", "sum the word lengths",
    ),
    operation(
        "length_dict", "dict building", "words -> dict", "{w: len(w) for w in $a}",
        "map each word to its length", "build a dict of word lengths",
    ),
    operation(
        "word_counts", "dict building", "words -> dict",
        "$u = {}\nfor w in $a:\n    $u[w] = $u.get(w, 0) + 1\n$u",
        "count each word in a dict", "build a dict of word counts",
    ),
)

TEXT_OPERATIONS = TRANSFORMS + STRING_FILTERS + STRING_COUNTS + STRING_CHECKS + STRING_SPLITS + WORDS
