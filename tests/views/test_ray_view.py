import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from cispo.metric_table import METRICS
from cispo.views.ray_view import RayView, gauge_name


def test_gauge_names_are_such_as_prometheus_takes() -> None:
    assert gauge_name("reward/mean") == "cispo_reward_mean"
    assert gauge_name("eval/held-out/pass@1") == "cispo_eval_held_out_pass_at_1"
    names = [gauge_name(metric.name.replace("{", "").replace("}", "")) for metric in METRICS]
    assert len(set(names)) == len(names)


@pytest.fixture
def ray_node() -> Iterator[dict[str, object]]:
    import ray

    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _system_config={"metrics_report_interval_ms": 200},
    )
    try:
        yield ray.nodes()[0]  # type: ignore[no-untyped-call]  # Ray leaves it without types
    finally:
        ray.shutdown()


def scrape(url: str, wanted: str, timeout_s: float) -> list[str]:
    """The exposed lines of our gauges, as soon as one line begins with what is wanted."""
    deadline_s = time.monotonic() + timeout_s
    lines: list[str] = []
    while time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(url, timeout=2) as reply:
                lines = [line for line in reply.read().decode().splitlines() if line.startswith("ray_cispo_")]
        except (urllib.error.URLError, TimeoutError):
            lines = []
        if any(line.startswith(wanted) for line in lines):
            return lines
        time.sleep(0.2)
    return lines


def test_gauges_are_served_on_the_metrics_port_of_the_node(ray_node: dict[str, object]) -> None:
    view = RayView("demo")
    view.step(3, {"reward/mean": 0.25, "eval/heldout/pass@1": 0.5, "reward/my-part/mean": 1.0})
    view.step(4, {"reward/mean": 0.75})
    url = f"http://{ray_node['NodeManagerAddress']}:{ray_node['MetricsExportPort']}/metrics"
    served = scrape(url, "ray_cispo_reward_mean{", timeout_s=15)
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in served if 'run="demo"' in line}
    assert values == {
        "ray_cispo_step": 4.0,
        "ray_cispo_reward_mean": 0.75,
        "ray_cispo_eval_heldout_pass_at_1": 0.5,
        "ray_cispo_reward_my_part_mean": 1.0,
    }
    with pytest.raises(ValueError, match="rename one of these reward parts"):
        view.step(5, {"reward/my_part/mean": 1.0})
