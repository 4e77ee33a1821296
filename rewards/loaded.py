"""A reward of a recipe, ready to be called: its function, its name in scores, and the keywords it takes."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cispo.errors import RewardError
from cispo.rewards.resolve import BUILT_INS, GROUP_BUILT_INS, check_reward, keyword_parameters, takes_all_columns
from cispo.rewards.settings import RewardSettings


@dataclass(frozen=True)
class LoadedReward:
    """label: the reward's name in the parts of a score, unique in the recipe."""

    settings: RewardSettings
    function: Callable[..., Any]
    label: str

    @property
    def is_built_in(self) -> bool:
        return self.settings.name in BUILT_INS

    @property
    def file(self) -> str | None:
        """The source file of a function of the user's own, where Python tells."""
        code = getattr(self.function, "__code__", None)
        return code.co_filename if code is not None and not self.is_built_in else None

    @property
    def scores_groups(self) -> bool:
        """Whether the function takes all completions of a group at once, with the sandbox itself; built-ins alone."""
        return self.settings.name in GROUP_BUILT_INS

    @property
    def needs_sandbox(self) -> bool:
        return self.scores_groups or self.takes("judge") or self.takes("judge_task")

    def takes(self, name: str) -> bool:
        return any(parameter.name == name for parameter in keyword_parameters(self.function))

    def keywords(self, row: Mapping[str, Any], supplied: Mapping[str, Any]) -> dict[str, Any]:
        """The columns, supplied values and args that the function takes. `**row` takes all but the judges.

        Raises RewardError for a name with two meanings, and for one that the function needs and nothing gives.
        """
        args = self.settings.args
        clashes = ({"prompt", "completion", *supplied} & {*row, *args}) | (set(row) & set(args))
        if clashes:
            raise RewardError(f"the name {min(clashes)!r} has two meanings; rename that column or arg")
        given = {**row, **supplied, **args}
        parameters = keyword_parameters(self.function)
        for parameter in parameters:
            if parameter.default is parameter.empty and parameter.name not in given:
                columns = ", ".join(sorted(row)) or "none"
                raise RewardError(f"it needs {parameter.name!r}, which is no column and no arg; columns: {columns}")
        named = {parameter.name for parameter in parameters}
        if takes_all_columns(self.function):
            named |= given.keys() - {"judge", "judge_task"}
        return {key: value for key, value in given.items() if key in named}


def load_rewards(rewards: Sequence[RewardSettings], base_path: Path) -> list[LoadedReward]:
    """Raises RewardError, one line, for the first reward that cannot be found or does not take its args."""
    loaded: list[LoadedReward] = []
    counts: Counter[str] = Counter()
    for settings in rewards:
        function = check_reward(settings, base_path=base_path)
        label = re.sub(r"\W", "_", settings.name.rpartition(":")[2], flags=re.ASCII)
        counts[label] += 1
        loaded.append(LoadedReward(settings, function, label if counts[label] == 1 else f"{label}_{counts[label]}"))
    return loaded
