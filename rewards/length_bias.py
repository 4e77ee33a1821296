"""Does a model that grades like long answers for their length? Watches its scores beside lengths, and warns.

Only completions of one prompt that are equally correct are compared: both are centred on the mean of their stratum
before they are correlated, so that hard prompts, which have long answers and low scores, do not count as a bias.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable

MIN_SAMPLES = 100
MIN_CORRELATION = 0.3
MIN_Z = 4.0

logger = logging.getLogger("cispo.rewards")


class LengthBias:
    """Sums over all strata seen so far; one warning, and again whenever four times as many samples say so."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._sums = [0.0, 0.0, 0.0]
        self._samples = 0
        self._warned_at = 0

    def add(self, samples: Iterable[tuple[Hashable, float, float]]) -> None:
        """Samples are (stratum, length in tokens, score); the samples of a stratum come in one call."""
        strata: dict[Hashable, list[tuple[float, float]]] = defaultdict(list)
        for stratum, length, score in samples:
            strata[stratum].append((length, score))
        for pairs in strata.values():
            self._add_stratum(pairs)
        self._warn()

    def _add_stratum(self, pairs: list[tuple[float, float]]) -> None:
        means = [sum(values) / len(pairs) for values in zip(*pairs, strict=True)]
        for length, score in pairs:
            x, y = length - means[0], score - means[1]
            for place, product in enumerate((x * x, y * y, x * y)):
                self._sums[place] += product
        # A stratum's mean takes one degree of freedom.
        self._samples += len(pairs) - 1

    @property
    def correlation(self) -> float | None:
        """Of score and length within strata, from -1 to 1; None before both vary."""
        lengths, scores, products = self._sums
        return products / math.sqrt(lengths * scores) if lengths > 0 and scores > 0 else None

    def _warn(self) -> None:
        found = self.correlation
        if found is None or self._samples < max(MIN_SAMPLES, 4 * self._warned_at) or abs(found) < MIN_CORRELATION:
            return
        if math.atanh(min(abs(found), 0.999999)) * math.sqrt(self._samples) < MIN_Z:
            return
        self._warned_at = self._samples
        liked = "longer" if found > 0 else "shorter"
        logger.warning(
            "reward %r favours %s completions among equally correct ones of one prompt: correlation of score and "
            "length %.2f over %d samples; check its prompts, or add the reward `length`",
            self._label, liked, found, self._samples,
        )  # fmt: skip
