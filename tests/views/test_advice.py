import math

import pytest

from cispo.views.advice import (
    PATIENCE_STEPS,
    RULES,
    Advisor,
    entropy_collapse,
    grad_norm_spike,
    mismatch_rise,
    not_finite,
    out_of_range,
    reward_hacked,
)

HEALTHY = {
    "reward/mean": 0.4,
    "reward/std": 0.3,
    "reward/frac_error": 0.0,
    "group/frac_solved_all": 0.2,
    "group/frac_mixed": 0.5,
    "completion/frac_truncated": 0.01,
    "policy/entropy": 0.8,
    "policy/mismatch/max": 0.0,
    "policy/mismatch/mean": 0.0,
    "optim/grad_norm": 1.0,
    "optim/updates": 4.0,
    "broadcast/checksum_ok": 1.0,
}


def test_a_healthy_run_is_left_in_peace() -> None:
    advisor = Advisor(every_steps=1)
    assert [advice for step in range(60) for advice in advisor.step(step, HEALTHY)] == []


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("group/frac_solved_all", 0.8, "raise the difficulty"),
        ("group/frac_solved_none", 0.9, "lower the difficulty"),
        ("completion/frac_truncated", 0.2, "raise rollout.max_completion_tokens"),
        ("policy/mismatch/max", 2.0, "check dtype"),
        ("off_policy/steps/mean", 9.0, "lower rollout.max_off_policy_steps"),
    ],
)
def test_noisy_metrics_are_pointed_out_when_they_stay_outside(name: str, value: float, remedy: str) -> None:
    bad = {**HEALTHY, name: value}
    assert out_of_range([bad] * (PATIENCE_STEPS - 1)) == {}
    assert out_of_range([bad, bad, {**HEALTHY, name: 0.0}, bad, bad]) == {}
    (text,) = out_of_range([bad] * PATIENCE_STEPS).values()
    assert text.startswith(f"{name} is {value:.3g} (healthy: ") and remedy in text


def test_a_step_that_did_not_measure_a_metric_does_not_end_its_row() -> None:
    bad = {"completion/frac_truncated": 0.5}
    assert list(out_of_range([bad, {}, bad, {}, bad])) == ["completion/frac_truncated"]
    assert out_of_range([bad, bad, bad, {}]) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reward/frac_error", 0.01),
        ("sandbox/frac_error", 0.5),
        ("broadcast/checksum_ok", 0.0),
        ("eval/x/well_formed", 0.5),
    ],
)
def test_what_admits_no_noise_is_pointed_out_at_once(name: str, value: float) -> None:
    assert list(out_of_range([{**HEALTHY, name: value}])) == [name]


def test_not_finite() -> None:
    assert not_finite([HEALTHY]) == {}
    assert list(not_finite([{**HEALTHY, "loss/policy": math.nan, "policy/version": math.inf}])) == [
        "loss/policy",
        "policy/version",
    ]


def test_grad_norm_spike() -> None:
    calm = [{"optim/grad_norm": 1.0 + i % 2} for i in range(9)]
    assert "usually 1" in grad_norm_spike([*calm, {"optim/grad_norm": 30.0}])["optim/grad_norm"]
    assert grad_norm_spike([*calm, {"optim/grad_norm": 5.0}]) == {}
    assert grad_norm_spike([*calm[:3], {"optim/grad_norm": 30.0}]) == {}
    assert grad_norm_spike([*calm, {"optim/grad_norm": 30.0}, {}]) == {}


def test_entropy_collapse() -> None:
    falling = [{"policy/entropy": 1.0 * 0.8**i} for i in range(15)]
    assert list(entropy_collapse(falling)) == ["policy/entropy"]
    assert entropy_collapse(falling[:5]) == {}
    assert entropy_collapse([{"policy/entropy": 1.0 - i / 40} for i in range(15)]) == {}


def test_mismatch_rise() -> None:
    name = "policy/mismatch/mean"
    assert list(mismatch_rise([{name: 1e-6}] * 8 + [{name: 1e-4}] * 3)) == [name]
    assert mismatch_rise([{name: 0.0}] * 8 + [{name: 1e-4}] * 3) == {}
    assert mismatch_rise([{name: 1e-6}] * 11) == {}


def test_reward_hacked() -> None:
    def evaluated(value: float, reward: float) -> dict[str, float]:
        return {"reward/mean": reward, "eval/x/pass@1": value, "eval/x/pass@1/high": value + 0.05}

    between = [{"reward/mean": 0.5}] * 3
    assert list(reward_hacked([evaluated(0.4, 0.3), *between, evaluated(0.3, 0.7)])) == ["eval/x/pass@1"]
    assert reward_hacked([evaluated(0.4, 0.3), *between, evaluated(0.38, 0.7)]) == {}
    assert reward_hacked([evaluated(0.4, 0.3), *between, evaluated(0.3, 0.2)]) == {}
    assert reward_hacked([evaluated(0.3, 0.7)]) == {}


def test_every_rule_stays_silent_on_a_run_that_measured_nothing() -> None:
    for rule in RULES:
        assert rule([{}]) == {} and rule([{}] * 30) == {}


def test_the_same_advice_is_given_once_in_so_many_steps() -> None:
    advisor = Advisor(every_steps=10)
    given = [step for step in range(1, 32) if advisor.step(step, {"reward/frac_error": 0.5})]
    assert given == [1, 11, 21, 31]
