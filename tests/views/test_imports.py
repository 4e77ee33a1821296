import subprocess
import sys

MODULES = "cispo.metrics, cispo.metric_table, cispo.group_metrics, cispo.statistics, cispo.views, cispo.views.rollouts"


def test_metrics_and_views_load_neither_torch_nor_ray_nor_wandb() -> None:
    code = f"import sys, {MODULES}; print(sorted({{'torch', 'ray', 'wandb'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
