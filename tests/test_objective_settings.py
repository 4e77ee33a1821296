import math
import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from cispo.learner_settings import LearnerSettings, scheduled_learning_rate
from cispo.objective_settings import CispoSettings, DapoSettings, ObjectiveSettings

OBJECTIVE: TypeAdapter[ObjectiveSettings] = TypeAdapter(ObjectiveSettings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"name": "cispo", "ratio_max": 0.28}, "absolute cap on the ratio"),
        ({"name": "cispo", "ratio_max": math.nan}, "at least 1"),
        ({"name": "cispo", "ratio_min": 0.5}, "without mask_ratio_low"),
        ({"name": "cispo", "ratio_min": 1.5, "mask_ratio_low": 0.5}, "absolute floor"),
        ({"name": "cispo", "mask_ratio_high": 0.2}, "at least 1 or null"),
        ({"name": "cispo", "mask_ratio_low": 1.2}, "rose|fell"),
        ({"name": "cispo", "reduction": "mixed"}, "needs a weight"),
        ({"name": "cispo", "reduction": "token", "mixed_sample_weight": 0.5}, "takes none"),
        ({"name": "cispo", "reduction": "constant"}, "reduction"),
        ({"name": "cispo", "anchor": "old"}, "anchor"),
        ({"name": "cispo", "epsilon_high": 4.0}, "epsilon_high"),
        ({"name": "cispo", "kl_coefficient": -0.1}, "kl_coefficient"),
        ({"name": "grpo", "clip_high": 0.2}, "not 0.2"),
        ({"name": "grpo", "clip_low": 1.2}, "not 0.2"),
        ({"name": "dr_grpo", "normaliser_tokens": 0}, "normaliser_tokens"),
        ({"name": "cispo", "rollout_correction": "truncated"}, "count twice"),
        ({"name": "grpo", "rollout_correction": "masked"}, "count twice"),
        ({"name": "cispo", "anchor": "proximal", "rollout_correction_max": 3.0}, "does nothing"),
        (
            {"name": "cispo", "anchor": "proximal", "rollout_correction": "truncated", "rollout_correction_min": 0.5},
            "a cap alone",
        ),
        (
            {"name": "dapo", "anchor": "proximal", "rollout_correction": "masked", "rollout_correction_max": 0.9},
            "newest weights",
        ),
        ({"name": "reinforce", "rollout_correction": "masked"}, "rollout_correction"),
        ({"name": "ppo"}, "cispo"),
    ],
)
def test_meaningless_settings_are_refused_with_the_reason(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        OBJECTIVE.validate_python(settings)


def test_a_dump_is_accepted_again() -> None:
    for name in ("cispo", "grpo", "dapo", "dr_grpo", "reinforce"):
        settings = OBJECTIVE.validate_python({"name": name})
        assert OBJECTIVE.validate_python(settings.model_dump()) == settings


def test_what_the_objectives_need() -> None:
    assert CispoSettings(anchor="proximal").needs_proximal
    assert not CispoSettings().needs_proximal
    assert not OBJECTIVE.validate_python({"name": "reinforce"}).needs_proximal
    assert CispoSettings(kl_coefficient=0.1).needs_reference
    assert (DapoSettings().clip_low, DapoSettings().clip_high) == (0.8, 1.28)


def test_learner_settings_are_checked() -> None:
    for wrong in ({"betas": (0.9, 1.0)}, {"learning_rate": 0.0}, {"updates_per_step": 0}, {"eps": 0.0}, {"lr": 1.0}):
        with pytest.raises(ValidationError):
            LearnerSettings(**{"learning_rate": 1e-4, **wrong})


def test_learning_rate_rises_then_falls_to_zero_and_stays() -> None:
    def rate(update: int, schedule: str) -> float:
        return scheduled_learning_rate(2.0, update, warmup_updates=4, schedule=schedule, total_updates=14)  # type: ignore[arg-type]  # parametrised by name

    assert [rate(update, "cosine") for update in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate(9, "linear") == pytest.approx(1.0)
    assert rate(9, "cosine") == pytest.approx(1.0)
    assert rate(1000, "constant") == 2.0
    assert rate(14, "linear") == rate(20, "linear") == 0.0
    assert rate(14, "cosine") == pytest.approx(0.0)


def test_settings_load_neither_torch_nor_ray() -> None:
    program = (
        "import sys, cispo.objective_settings, cispo.advantage, cispo.learner_settings;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
