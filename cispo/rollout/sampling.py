"""Sampling a token, with noise that is a function of who asks and where, not of when or beside whom.

The uniform number for a token depends on (run seed, stream, prompt id, completion index, position) alone, so a request
samples the same whatever batch, worker or order it runs in.

B sequences, V vocabulary.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cispo.kernels import cpu_library, head_cpu
from cispo.rollout.filters import Filters, cut_logits

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def noise_key(seed: int, stream: str, prompt_id: str, completion_index: int) -> np.uint64:
    """The 64-bit key of one completion's noise; equal names of different requests would share it."""
    name = "\x00".join((str(seed), stream, prompt_id, str(completion_index)))
    return np.uint64(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))


def uniforms(key_B: npt.NDArray[np.uint64], position_B: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) a (key, position): SplitMix64 (Steele et al., OOPSLA 2014) as a counter-based hash."""
    with np.errstate(over="ignore"):
        z = key_B + (position_B.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        z ^= z >> np.uint64(31)
    uniform_B: npt.NDArray[np.float64] = (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform_B


def sample_tokens(
    logits_BV: Tensor, uniform_B: Tensor, temperature_B: Tensor | None = None, filters: Filters | None = None
) -> tuple[Tensor, Tensor]:
    """Inverse of the distribution function at one uniform number a row.

    logits_BV: float32. uniform_B: float64 in [0, 1). temperature_B: float32, divides each row's logits; None is 1, and
    0 takes the largest logit, with its logprob at 1. filters: what of the distribution may be drawn; None is all.
    Returns ids_B (int64) and logprob_B (float32), the log-probability of the sampled token over the whole vocabulary;
    the head divides by the temperature in the same way, so they are the learner's to the last bit.
    """
    if filters is None:
        cut_BV = None
    else:
        cut_BV = cut_logits(
            logits_BV, torch.ones_like(logits_BV[:, 0]) if temperature_B is None else temperature_B, filters
        )
    if cpu_library.serves(logits_BV):
        return head_cpu.sample(logits_BV, uniform_B, temperature_B, cut_BV)
    if logits_BV.is_cuda:
        # By the kernels of the learner's pass: another order of sums would differ in the last bits of a logprob.
        from cispo.kernels.gpu.choose import choose
        from cispo.kernels.gpu.head import row_logprobs

        temperature_B = torch.ones_like(logits_BV[:, 0]) if temperature_B is None else temperature_B
        ids_B = choose(logits_BV if cut_BV is None else cut_BV, uniform_B, temperature_B)
        return ids_B, row_logprobs(logits_BV, ids_B, torch.where(temperature_B == 0, 1.0, temperature_B))
    return _plain(logits_BV, uniform_B, temperature_B, cut_BV)


def _plain(
    logits_BV: Tensor, uniform_B: Tensor, temperature_B: Tensor | None, cut_BV: Tensor | None
) -> tuple[Tensor, Tensor]:
    drawn_BV, is_greedy_B = logits_BV if cut_BV is None else cut_BV, None
    greedy_B1 = drawn_BV.argmax(-1, keepdim=True)
    if temperature_B is not None:
        is_greedy_B = temperature_B == 0
        temperature_B1 = temperature_B.masked_fill(is_greedy_B, 1.0).unsqueeze(1)
        logits_BV, drawn_BV = logits_BV / temperature_B1, drawn_BV / temperature_B1
    logprob_BV = torch.log_softmax(logits_BV, dim=-1)
    weight_BV = logprob_BV.exp() if cut_BV is None else torch.softmax(drawn_BV, dim=-1)
    cumulative_BV = torch.cumsum(weight_BV, dim=-1, dtype=torch.float64)
    threshold_B1 = (uniform_B * cumulative_BV[:, -1]).unsqueeze(1)
    ids_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True).clamp_(max=logits_BV.shape[1] - 1)
    if is_greedy_B is not None:
        ids_B1 = torch.where(is_greedy_B.unsqueeze(1), greedy_B1, ids_B1)
    return ids_B1.squeeze(1), logprob_BV.gather(1, ids_B1).squeeze(1)
