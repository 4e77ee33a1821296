"""What a rollout worker tells Ray about its engine, for the dashboard's charts: load, speed, cache, ends."""

from collections import Counter

from ray.util.metrics import Counter as RayCounter
from ray.util.metrics import Gauge

from cispo.rollout.engine import Engine
from cispo.types import StopReason

GAUGES = {
    "queue_depth": "Groups that wait for a slot.",
    "batch_size": "Completions in slots.",
    "cache_share": "Pages of keys and values in use, of all.",
    "tokens_per_s": "Completion tokens per second of the engine's work, over the last slice.",
}
TAGS = ("run", "worker")


class EngineGauges:
    """Ray metrics `cispo_rollout_*` of one engine; `update` after each slice of its work."""

    def __init__(self, engine: Engine, *, run: str, worker: str) -> None:
        self._engine = engine
        self._tags = {"run": run, "worker": worker}
        self._gauges = {
            name: Gauge(f"cispo_rollout_{name}", description=text, tag_keys=TAGS) for name, text in GAUGES.items()
        }
        self._ends = RayCounter(
            "cispo_rollout_completions", description="Completions that ended, by reason.", tag_keys=(*TAGS, "reason")
        )
        self._tokens = 0
        self._counted: Counter[StopReason] = Counter()

    def update(self, busy_s: float) -> None:
        """busy_s: seconds that the engine worked since the last call."""
        engine = self._engine
        values = {
            "queue_depth": float(engine.waiting_groups),
            "batch_size": float(engine.active_completions),
            "cache_share": engine.cache_share,
            "tokens_per_s": (engine.completion_tokens - self._tokens) / busy_s if busy_s > 0 else 0.0,
        }
        self._tokens = engine.completion_tokens
        for name, value in values.items():
            self._gauges[name].set(value, self._tags)
        for reason, count in engine.stop_reasons.items():
            if count > self._counted[reason]:
                self._ends.inc(count - self._counted[reason], {**self._tags, "reason": reason.value})
                self._counted[reason] = count
