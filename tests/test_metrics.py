import math
import pickle
import random
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from cispo.metric_table import METRICS, MetricNameError, check_names, find_metric, render_metrics_doc
from cispo.metrics import Last, Max, Mean, Quantile, Std, StepMetrics, Sum
from cispo.types import StopReason

DOC = Path(__file__).parents[1] / "docs" / "metrics.md"
NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


def reduced(name: str, *records: Mean | Sum | Max | Last | Std | Quantile) -> float:
    metrics = StepMetrics()
    for record in records:
        metrics.add(name, record)
    return metrics.reduce()[name]


def test_mean_weighs_its_records() -> None:
    assert reduced("reward/mean", Mean(1.0, weight=3), Mean(0.0), Mean(math.nan, weight=0)) == 0.75


def test_sum_max_last() -> None:
    assert reduced("perf/sandbox_executions", Sum(1), Sum(1), Sum(3)) == 5.0
    assert reduced("policy/mismatch/max", Max(-2.0), Max(-1.0)) == -1.0
    assert reduced("optim/lr", Last(0.1), Last(0.2)) == 0.2


@given(NUMBERS)
def test_std_and_quantile_agree_with_numpy(values: list[float]) -> None:
    half = len(values) // 2
    std = reduced("reward/std", Std(tuple(values[:half])), Std(tuple(values[half:])))
    assert std == pytest.approx(float(np.std(values)), rel=1e-6, abs=1e-6)
    for q in (0.0, 0.5, 0.999, 1.0):
        quantile = reduced("policy/mismatch/p999", Quantile(tuple(values[:half]), q), Quantile(tuple(values[half:]), q))
        assert quantile == pytest.approx(float(np.quantile(values, q)), rel=1e-9, abs=1e-9)


@given(NUMBERS, st.randoms())
def test_the_order_of_records_changes_no_bit(values: list[float], rng: random.Random) -> None:
    shuffled = list(values)
    rng.shuffle(shuffled)
    for kind in (Mean, Sum, Max):
        forward = reduced("reward/mean", *[kind(value) for value in values])
        assert forward == reduced("reward/mean", *[kind(value) for value in shuffled])
    assert reduced("reward/std", Std(tuple(values))) == reduced("reward/std", *(Std((value,)) for value in shuffled))


def test_nothing_observed_is_absent_and_the_rest_is_in_alphabetical_order() -> None:
    metrics = StepMetrics()
    metrics.add("reward/std", Std(()))
    metrics.add("reward/mean", Mean(1.0, weight=0.0))
    metrics.add("policy/version", Last(3))
    metrics.add("loss/policy", Mean(-0.5))
    assert list(metrics.reduce().items()) == [("loss/policy", -0.5), ("policy/version", 3.0)]
    assert all(type(value) is float for value in metrics.reduce().values())


def test_non_finite_values_stay_visible() -> None:
    assert math.isnan(reduced("loss/policy", Mean(1.0), Mean(math.nan)))
    assert reduced("optim/grad_norm", Max(math.inf), Max(1.0)) == math.inf
    assert math.isnan(reduced("optim/grad_norm", Max(1.0), Max(math.nan), Max(2.0)))
    assert math.isnan(reduced("loss/policy", Mean(math.inf), Mean(-math.inf)))


def test_records_travel_between_processes() -> None:
    worker = StepMetrics()
    worker.add("reward/mean", Mean(1.0))
    loop = StepMetrics()
    loop.add("reward/mean", Mean(0.0))
    loop.extend(pickle.loads(pickle.dumps(worker)))
    loop.update({"optim/updates": 4})
    assert loop.reduce() == {"optim/updates": 4.0, "reward/mean": 0.5}


def test_one_name_has_one_kind_and_one_owner() -> None:
    metrics = StepMetrics()
    metrics.add("reward/mean", Mean(1.0))
    with pytest.raises(TypeError, match="Max after Mean"):
        metrics.add("reward/mean", Max(1.0))
    with pytest.raises(ValueError, match="reward/mean set twice"):
        metrics.update({"reward/mean": 1.0})
    with pytest.raises(ValueError, match="different order"):
        reduced("policy/mismatch/p999", Quantile((1.0,), 0.5), Quantile((1.0,), 0.9))


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("reward/maen", "reward/mean"),
        ("completion/length/mean", "completion/length_tokens/mean"),
        ("policy/mismatch/p99", "policy/mismatch/p999"),
        ("eval/heldout/pas@1", "eval/heldout/pass@1"),
        ("stop/tired", "stop/{reason}"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(MetricNameError) as error:
        StepMetrics().add(wrong, Mean(0.0))
    assert repr(wrong) in str(error.value) and f"did you mean {nearest!r}" in str(error.value)


def test_all_unknown_names_are_reported_at_once() -> None:
    with pytest.raises(MetricNameError) as error:
        check_names(["reward/mean", "reward/meen", "optim/lrr"])
    assert len(str(error.value).splitlines()) == 2


def test_names_with_placeholders() -> None:
    for reason in StopReason:
        assert find_metric(f"stop/{reason}") is not None
    for name in ("reward/code/mean", "reward/my_part.v2/mean", "eval/a/pass@1", "eval/a-b/pass@16", "eval/x/avg@4"):
        assert find_metric(name) is not None, name
    exact = find_metric("eval/heldout/pass@1")
    assert exact is not None and exact.name == "eval/{name}/pass@1"
    for name in ("reward//mean", "reward/a/b/mean", "eval/heldout/pass@0", "eval/heldout/pass@k", "stop/"):
        assert find_metric(name) is None, name


def test_every_row_is_complete_and_every_bounded_row_says_what_to_do() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert metric.meaning and metric.unit
        if metric.low is not None or metric.high is not None:
            assert metric.action, metric.name


def test_health_of_values() -> None:
    row = next(metric for metric in METRICS if metric.name == "policy/ratio/mean")
    assert row.is_healthy(0.9) and row.is_healthy(1.0) and row.is_healthy(1.1)
    assert not row.is_healthy(0.89) and not row.is_healthy(1.11) and not row.is_healthy(math.nan)
    free = next(metric for metric in METRICS if metric.name == "loss/policy")
    assert free.is_healthy(-1e9) and not free.is_healthy(math.inf)


def test_settings_named_in_the_table_and_in_advice_exist() -> None:
    from cispo.recipe.schema import TrainRecipe

    advice = Path(__file__).parents[1] / "cispo" / "views" / "advice.py"
    text = "\n".join([advice.read_text(), *(f"{metric.meaning}\n{metric.action}" for metric in METRICS)])
    names = setting_names(TrainRecipe)
    sections = "|".join({name.split(".")[0] for name in names if "." in name})
    named = set(re.findall(rf"\b((?:{sections})\.[a-z_]+)", text))
    assert "learner.learning_rate" in named
    assert named - names == set()


def setting_names(section: Any, prefix: str = "") -> set[str]:
    """Dotted names of all settings below a pydantic model, whichever variant of a union has them."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        fields = section.model_fields.items()
        return {prefix + name for name in section.model_fields}.union(
            *(setting_names(field.annotation, f"{prefix}{name}.") for name, field in fields)
        )
    return set().union(*(setting_names(variant, prefix) for variant in get_args(section)))


def test_the_metrics_page_is_current() -> None:
    assert DOC.read_text() == render_metrics_doc(), "write it again: python -m cispo.metric_table > docs/metrics.md"
