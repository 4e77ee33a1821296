"""The metrics of a run as gauges of Ray, on the metrics endpoint of its nodes and so on the Ray dashboard.

A metric `reward/mean` is the gauge `cispo_reward_mean`, exported by Ray as `ray_cispo_reward_mean`, with the tag `run`.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cispo.errors import UnsupportedError
from cispo.metric_table import find_metric
from cispo.views.views import View

if TYPE_CHECKING:
    from ray.util.metrics import Gauge


def gauge_name(metric: str) -> str:
    """A name that Prometheus takes: `eval/heldout/pass@1` is `cispo_eval_heldout_pass_at_1`."""
    return "cispo_" + re.sub(r"[^A-Za-z0-9]+", "_", metric.replace("@", "_at_"))


class RayView(View):
    """Sets one gauge a metric; only in a process that has joined Ray, for gauges set elsewhere are lost unseen."""

    name = "Ray metrics"

    def __init__(self, run: str) -> None:
        import ray

        if not ray.is_initialized():
            raise UnsupportedError("this process has not joined Ray, and gauges would be lost; call ray.init first")
        self._tags = {"run": run}
        self._gauges: dict[str, Gauge] = {}
        self._metric_of: dict[str, str] = {}

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        for metric, value in (("step", float(step)), *metrics.items()):
            if metric not in self._gauges:
                self._gauges[metric] = self._make_gauge(metric)
            self._gauges[metric].set(value, self._tags)

    def _make_gauge(self, metric: str) -> "Gauge":
        from ray.util.metrics import Gauge

        name = gauge_name(metric)
        owner = self._metric_of.setdefault(name, metric)
        if owner != metric:
            raise ValueError(f"{metric} and {owner} are both the gauge {name}; rename one of these reward parts")
        row = find_metric(metric)
        return Gauge(name, row.meaning if row else "steps that have ended", tag_keys=("run",))
