"""The one table of metric names: what each means, its unit, where it is healthy, and what to do when it is not.

A name is `group/name[/statistic]` in snake_case. Placeholders in braces stand for a reward part, a stop reason, an
evaluation or a number of completions. A metric is absent from a step that had nothing to measure.
`python -m cispo.metric_table` prints docs/metrics.md; the healthy ranges also drive the advice of a run.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from cispo.errors import CispoError
from cispo.types import StopReason


class MetricNameError(CispoError, ValueError):
    """A metric name is not in the table; the message names the nearest that is."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table; a value in [low, high] is healthy, and None leaves that end open."""

    name: str
    meaning: str
    unit: str = "1"
    low: float | None = None
    high: float | None = None
    action: str = ""

    @property
    def healthy(self) -> str:
        if self.low is not None and self.low == self.high:
            return f"{self.low:g}"
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"at least {self.low:g}"
        return f"at most {self.high:g}" if self.high is not None else "any"

    def is_healthy(self, value: float) -> bool:
        """NaN and infinities are never healthy."""
        if not abs(value) < float("inf"):
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


_BROADCAST = "weights differ between worker and learner: stop the run and report the sizes and versions in log.txt"
_MISMATCH = "rollout and learner disagree at equal weights: check dtype, temperature and the broadcast's version"
_STALE = "lower rollout.max_off_policy_steps, or give the learner more of the machine"
_SLOW = "compare the other time_s/ rows: the largest is what to make faster"

METRICS: tuple[Metric, ...] = (
    Metric("reward/mean", "mean reward of the scored completions of the step", action="read a few: `cispo view RUN`"),
    Metric("reward/std", "population standard deviation of the reward over completions", low=1e-6,
           action="all rewards are equal, so nothing can be learned: check the reward on a few completions"),
    Metric("reward/{part}/mean", "mean of one named part of the reward, before its weight",
           action="a part that falls while the total rises is being traded away: change its weight"),
    Metric("reward/frac_error", "share of completions whose reward failed; they are masked, not scored 0", high=0.0,
           action="read the score messages with `cispo view RUN`; mend the reward or the sandbox"),
    Metric("group/frac_solved_all", "share of groups in which every completion got the full reward", high=0.7,
           action="raise the difficulty: harder prompts, or drop the solved ones"),
    Metric("group/frac_solved_none", "share of groups in which no completion got the full reward", high=0.7,
           action="lower the difficulty: easier prompts, more completions in a group, or start from more sft"),
    Metric("group/frac_mixed", "share of groups whose rewards differ; only these carry a gradient", low=0.1,
           action="too few groups teach: see group/frac_solved_all and group/frac_solved_none"),
    Metric("group/dropped", "groups left out of the update because their rewards are all equal or masked", "groups"),
    Metric("group/left_out_solved", "prompts that this pass over the data leaves out, solved at rollout.drop_solved_at",
           "prompts"),
    Metric("completion/length_tokens/mean", "mean length of a completion", "tokens",
           action="a steady rise towards the limit asks for an overlong penalty; a collapse hints at a hacked reward"),
    Metric("completion/length_tokens/p99", "99th percentile of lengths, with rollout.length_windows", "tokens"),
    Metric("completion/perplexity", "perplexity of the tokens sampled, with rollout.length_windows"),
    Metric("completion/window_tokens", "new tokens that a completion of this step might have", "tokens",
           action="it rises once perplexity has converged and length_tokens/p99 is near: see rollout.length_windows"),
    Metric("completion/length_tokens/max", "length of the longest completion", "tokens"),
    Metric("completion/frac_truncated", "share of completions cut off by their length limit or for repetition",
           high=0.15, action="see stop/length: raise rollout.max_completion_tokens or penalise overlong completions"),
    Metric("completion/frac_interrupted", "share of completions whose thinking spent rollout.thinking.tokens",
           action="a steady rise: raise rollout.thinking.tokens, answers come from unfinished thoughts"),
    Metric("stop/{reason}", "share of completions that ended for this reason"),
    Metric("loss/policy", "the objective's value as its paper writes it, not the surrogate that is differentiated",
           action="its trend means little by itself: judge by reward and evaluation"),
    Metric("loss/frac_clipped_high", "share of tokens whose importance ratio met the upper bound", high=0.3,
           action="updates are too far off-policy: lower learner.learning_rate or learner.updates_per_step"),
    Metric("loss/frac_clipped_low", "share of tokens whose importance ratio met the lower bound", high=0.3,
           action="updates are too far off-policy: lower learner.learning_rate or learner.updates_per_step"),
    Metric("loss/frac_masked", "share of sampled tokens that the objective's mask or a failed score took out", high=0.3,
           action="the gradient comes from few tokens: loosen the mask, or mend what failed"),
    Metric("loss/frac_correction_bounded", "share of tokens whose weight of rollout_correction met its bounds",
           high=0.1, action="sampled by policies too far from the learner's: lower rollout.max_off_policy_steps"),
    Metric("loss/router_aux", "load-balancing loss of the routers, before its coefficient; even loads give top-k",
           action="a steady rise: raise learner.router_aux_loss_coef"),
    Metric("policy/ratio/mean", "mean importance ratio of the tokens trained", low=0.9, high=1.1,
           action="the policy moves far within one batch: lower learner.learning_rate or learner.updates_per_step"),
    Metric("policy/ratio/max", "largest importance ratio of a token trained", high=1000.0,
           action="one token's probability changed by orders of magnitude: lower learner.learning_rate"),
    Metric("policy/rollout_correction/mean", "mean weight of rollout_correction, proximal over rollout policy", low=0.8,
           high=1.2, action="see loss/frac_correction_bounded"),
    Metric("policy/entropy", "mean entropy of the policy over sampled tokens", "nats", low=0.02,
           action="the policy has nearly stopped exploring: lower learner.learning_rate or raise rollout.temperature"),
    Metric("policy/kl_reference", "estimated KL divergence from the reference policy to the policy, a token", "nats",
           low=-0.001, high=1.0, action="far from the reference: raise objective.kl_coefficient, or accept it"),
    Metric("policy/mismatch/max", "largest |rollout logprob - learner logprob| of a token at equal weights", "nats",
           high=0.5, action=_MISMATCH),
    Metric("policy/mismatch/mean", "mean |rollout logprob - learner logprob| at equal weights", "nats",
           high=0.01, action=_MISMATCH),
    Metric("policy/mismatch/p999", "99.9th percentile of |rollout logprob - learner logprob| at equal weights", "nats",
           high=0.1, action=_MISMATCH),
    Metric("policy/mismatch_kl", "estimated KL divergence from rollout to learner at equal weights, a token", "nats",
           high=0.001, action=_MISMATCH),
    Metric("policy/version", "policy version after the step's updates; it grows by 1 with each broadcast", "version"),
    Metric("off_policy/steps/mean", "mean age of the tokens trained, in policy versions", "steps",
           high=4.0, action=_STALE),
    Metric("off_policy/steps/max", "greatest age of a token trained", "steps", high=16.0, action=_STALE),
    Metric("router/max_load", "tokens of the busiest expert of any layer, relative to an even share",
           action="a steady rise: raise learner.router_aux_loss_coef, few experts do the work of all"),
    Metric("router/entropy", "mean entropy of a router's softmax over all experts", "nats",
           action="a steady fall: raise learner.router_aux_loss_coef, routers lose their second choices"),
    Metric("router/frac_differing", "share of replayed experts that the learner's routers would not choose themselves",
           action="routers move fast between sampling and training: lower learner.updates_per_step"),
    Metric("optim/grad_norm", "largest norm of the whole gradient before clipping, over the step's updates", low=1e-9,
           high=100.0, action="a lasting spike: lower learner.learning_rate; a zero: no group carried a gradient"),
    Metric("optim/lr", "learning rate of the step's last update"),
    Metric("optim/updates", "optimiser updates made in the step", "updates", low=1.0,
           action="no update was made: every group was dropped, see group/frac_mixed"),
    Metric("time_s/step", "wall time of the whole step", "s", action=_SLOW),
    Metric("time_s/rollout", "wall time of sampling", "s", action=_SLOW),
    Metric("time_s/reward", "wall time spent waiting for rewards after sampling ended", "s",
           action="raise sandbox.workers, or make the reward cheaper"),
    Metric("time_s/sandbox", "wall time of all programs run in a sandbox, summed over those that ran side by side", "s",
           action="programs are slow or the machine is overloaded: lower sandbox.workers or sandbox.cpu_s"),
    Metric("time_s/forward_backward", "wall time of the learner's forward and backward passes and updates", "s",
           action=_SLOW),
    Metric("time_s/broadcast", "wall time until every worker held the new weights", "s", action=_SLOW),
    Metric("time_s/broadcast_link", "of it, in which weights were under way through links", "s", action=_SLOW),
    Metric("time_s/checkpoint", "wall time of writing a checkpoint", "s", action="raise checkpoint.every_steps"),
    Metric("time_s/evaluation", "wall time of evaluation", "s", action="raise evaluation.every_steps"),
    Metric("perf/completion_tokens_per_s", "sampled tokens per second of the whole step", "tokens/s"),
    Metric("perf/learner_tokens_per_s",
           "packed tokens through the learner per second of its work; a shared prompt counts once", "tokens/s"),
    Metric("perf/mfu",
           "operations that packed tokens need per second of the learner's work, as a share of its devices' peak",
           action="raise learner.tokens_per_micro_batch; do without learner.activation_checkpointing if memory allows"),
    Metric("perf/rollout_idle_share", "share of the step in which rollout workers had nothing to sample, their mean",
           action="the learner is the slower one: give it more of the machine, or raise rollout.max_off_policy_steps"),
    Metric("perf/learner_idle_share", "share of the step in which the learner had nothing to train on",
           action="sampling is the slower one: add rollout.workers, or raise rollout.max_off_policy_steps"),
    Metric("perf/sandbox_executions", "programs run in a sandbox in the step", "programs"),
    Metric("perf/sandbox_cache_hits", "verdicts taken from the cache, which a resumed run has lost", "programs"),
    Metric("eval/{name}/pass@1", "probability that one completion is right: mean over prompts of their mean"),
    Metric("eval/{name}/pass@{k}", "probability that at least one of k completions is right, unbiased"),
    Metric("eval/{name}/pass@{k}/low", "lower end of the 95% interval of pass@k"),
    Metric("eval/{name}/pass@{k}/high", "upper end of the 95% interval of pass@k"),
    Metric("eval/{name}/avg@{k}", "mean reward of k completions a prompt, partial credit included"),
    Metric("eval/{name}/avg@{k}/low", "lower end of the 95% interval of avg@k"),
    Metric("eval/{name}/avg@{k}/high", "upper end of the 95% interval of avg@k"),
    Metric("eval/{name}/well_formed", "share of completions that parse, define what was asked, and end by themselves",
           low=0.8, action="form is being lost: check the chat template, the stop token and the length limit"),
    Metric("eval/{name}/correct_given_form", "share of right completions among the well-formed ones"),
    Metric("eval/{name}/frac_error", "share of evaluated completions whose reward failed; they are left out", high=0.0,
           action="mend the reward or the sandbox: the other numbers are over fewer completions than asked for"),
    Metric("eval/{name}/completion_length_tokens/mean", "mean length of an evaluated completion", "tokens"),
    Metric("sandbox/frac_timeout", "share of verdicts on programs that were stopped at their time limit", high=0.2,
           action="programs loop, or the limits are tight for this machine: read a few, then raise sandbox.cpu_s"),
    Metric("sandbox/frac_error", "share of verdicts that are missing because the sandbox itself failed", high=0.0,
           action="the machine, not the policy, is at fault: read log.txt, check memory and process limits"),
    Metric("sft/loss", "mean negative logprob of the completion tokens trained since the last line", "nats",
           action="a rise that lasts: lower learner.learning_rate"),
    Metric("sft/heldout_loss", "mean negative logprob of the completion tokens of held-out examples", "nats",
           action="it rises while sft/loss falls: the examples are being learned by heart, stop earlier"),
    Metric("sft/grad_norm", "largest gradient norm before clipping since the last line", high=100.0,
           action="a lasting spike: lower learner.learning_rate or raise learner.warmup_updates"),
    Metric("sft/lr", "learning rate of the last update"),
    Metric("faults/rollout", "rollout workers that died and were replaced; their groups were sampled again",
           high=0.0, action="read log.txt: memory, a crashing kernel, or a machine that left"),
    Metric("faults/reward", "reward workers that died in the step and were replaced", high=0.0,
           action="read log.txt: a reward that ends or overfills its process"),
    Metric("faults/unsampled", "prompts of the step without completions: refused, failed or quarantined", high=0.0,
           action="read log.txt for the reasons, mend or remove the prompts"),
    Metric("broadcast/bytes", "size of the weights sent to each worker", "bytes"),
    Metric("broadcast/gb_per_s", "weights through links to all workers, over the time that it took", "GB/s"),
    Metric("broadcast/checksum_ok", "1 when every worker proved that it holds the learner's weights", low=1.0, high=1.0,
           action=_BROADCAST),
)

_PLACEHOLDERS = {
    "part": r"[A-Za-z_][\w.-]*",
    "reason": "|".join(re.escape(reason.value) for reason in StopReason),
    "name": r"[A-Za-z_][\w.-]*",
    "k": r"[1-9]\d*",
}


def _pattern(name: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", name)
    texts = [f"(?:{_PLACEHOLDERS[piece]})" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces)]
    return re.compile("".join(texts))


_EXACT = {metric.name: metric for metric in METRICS if "{" not in metric.name}
_TEMPLATES = tuple((_pattern(metric.name), metric) for metric in METRICS if "{" in metric.name)


@cache
def find_metric(name: str) -> Metric | None:
    """The row of a name, or None when the table has none."""
    if name in _EXACT:
        return _EXACT[name]
    return next((metric for pattern, metric in _TEMPLATES if pattern.fullmatch(name)), None)


def check_names(names: Iterable[str]) -> None:
    """Raise MetricNameError, one line a name, when some are not in the table."""
    wrong = [name for name in names if find_metric(name) is None]
    if wrong:
        raise MetricNameError("\n".join(_describe_unknown(name) for name in wrong))


def _describe_unknown(name: str) -> str:
    spellings = [metric.name.replace("{name}", _second(name)) for metric in METRICS]
    nearest = difflib.get_close_matches(name, spellings, n=1, cutoff=0.0)[0]
    return f"metrics: no metric is named {name!r}; did you mean {nearest!r}? (the table is in docs/metrics.md)"


def _second(name: str) -> str:
    """The part between the first two slashes, which is what a placeholder most often stands for."""
    return [*name.split("/"), ""][1] or "name"


def render_metrics_doc() -> str:
    """docs/metrics.md as it must stand in the repository."""
    lines = [
        "# Metrics",
        "",
        "Every step writes one line of these names to `metrics.jsonl` in the run folder; the console, W&B and Ray show",
        "the same numbers (in Ray as `ray_cispo_<name>`, with `_at_` for `@` and `_` for other characters that are no",
        "letter or digit). A metric is absent from a step that had nothing to measure. Names under `time_s/` and",
        "`perf/` depend on the machine; in a synchronous run on CPU all others repeat bit for bit with the run.",
        "While a run goes on, values outside their healthy range are pointed out with what to do.",
        "",
        "This page is printed by `python -m cispo.metric_table`; edit the table in that module instead.",
    ]
    group = ""
    for metric in METRICS:
        if metric.name.split("/")[0] != group:
            group = metric.name.split("/")[0]
            lines += ["", f"## {group}", ""]
            lines += ["| name | meaning | unit | healthy | outside of it |", "|---|---|---|---|---|"]
        cells = (f"`{metric.name}`", metric.meaning, metric.unit, metric.healthy, metric.action)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render_metrics_doc(), end="")
