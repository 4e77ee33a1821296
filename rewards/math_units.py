"""Units that answers carry, with exact factors: `500 cm` is `5 m`, and `5 cm` is not.

A unit is a dimension and the size of one in that dimension. Things that are counted (apples, ways) have a dimension of
their own each.
"""

from fractions import Fraction

Unit = tuple[str, Fraction]

_SCALES = {
    "length": {
        "mm millimeter millimeters millimetre millimetres": "1/1000",
        "cm centimeter centimeters centimetre centimetres": "1/100",
        "m meter meters metre metres": "1", "km kilometer kilometers kilometre kilometres": "1000",
        "in inch inches": "254/10000", "ft foot feet": "3048/10000", "yd yard yards": "9144/10000",
        "mi mile miles": "1609344/1000",
    },
    "mass": {
        "mg milligram milligrams": "1/1000", "g gram grams": "1", "kg kilogram kilograms": "1000",
        "ton tons tonne tonnes": "1000000", "lb lbs pound pounds": "45359237/100000", "oz ounce ounces":
        "28349523125/1000000000",
    },
    "time": {
        "ms millisecond milliseconds": "1/1000", "s sec secs second seconds": "1", "min mins minute minutes": "60",
        "h hr hrs hour hours": "3600", "day days": "86400", "week weeks": "604800",
    },
    "volume": {"ml mL milliliter milliliters": "1/1000", "L l liter liters litre litres": "1"},
    "speed": {"m/s": "1", "km/h kph": "5/18", "mph miles/hour": "1609344/3600000"},
    "money": {"dollar dollars USD usd": "1", "cent cents": "1/100"},
    "angle": {"degree degrees": "1"},
    "unit": {"unit units": "1"},
}  # fmt: skip
_COUNTED = (
    "apple apples book books way ways people person persons student students coin coins marble marbles car cars card "
    "cards year years month months point points page pages egg eggs child children boy boys girl girls ball balls "
    "box boxes side sides edge edges vertex vertices game games ticket tickets number numbers term terms digit digits "
    "step steps solution solutions square squares triangle triangles"
)

UNITS: dict[str, Unit] = {
    name: (dimension, Fraction(size))
    for dimension, scale in _SCALES.items()
    for names, size in scale.items()
    for name in names.split()
}
_IRREGULAR = {"people": "person", "persons": "person", "children": "child", "vertices": "vertex", "boxes": "box"}
UNITS |= {name: (_IRREGULAR.get(name, name.rstrip("s")), Fraction(1)) for name in _COUNTED.split()}
UNIT_WORDS = frozenset(name.lower() for name in UNITS if len(name) > 1 and name.isalpha())
"""Names that are taken for units outside of \\text{} too; one letter there is a variable."""


def unit_of(text: str, power: int = 1) -> Unit | None:
    """The unit that a text such as `cm`, `square meters`, `cm^2` or `miles per hour` names, or None."""
    text = " ".join(text.rstrip(".").split()).replace(" per ", "/").replace(" / ", "/")
    for words, raised in (("square ", 2), ("sq ", 2), ("sq. ", 2), ("cubic ", 3)):
        if text.lower().startswith(words):
            text, power = text[len(words) :], power * raised
    for mark, raised in (("^2", 2), ("^3", 3), ("^{2}", 2), ("^{3}", 3), (" squared", 2), (" cubed", 3)):
        if text.endswith(mark):
            text, power = text.removesuffix(mark), power * raised
    found = UNITS.get(text) or UNITS.get(text.lower() if len(text) > 1 else text)
    if found is None or power not in (1, 2, 3):
        return None
    dimension, size = found
    return (dimension if power == 1 else f"{dimension}^{power}", size**power)
