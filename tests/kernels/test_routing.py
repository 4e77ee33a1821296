"""The rule of routing: ties, weights, thresholds, and entropy at its ends."""

import math

import torch

from cispo.kernels.routing import route, router_entropy


def test_equal_logits_go_to_the_lower_index_and_weights_sum_to_one() -> None:
    routing = route(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 5.0, 1.0, 5.0]]), 2)
    assert routing.expert_ids_NK.tolist() == [[0, 1], [1, 3]]
    torch.testing.assert_close(routing.weight_NK.sum(-1), torch.ones(2))


def test_a_threshold_keeps_the_heaviest_and_the_sum() -> None:
    logits_NE = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    for is_renormalised, whole in ((True, 1.0), (False, 0.9)):
        kept = []
        for threshold in (0.0, 0.2, 0.3, 0.4, 0.99):
            routing = route(logits_NE, 3, is_renormalised=is_renormalised, threshold_N=torch.tensor([threshold]))
            kept.append(routing.kept_ids_NK.tolist()[0])
            torch.testing.assert_close(routing.weight_NK.sum(), torch.tensor(whole))
        assert kept == [[3, 2, 1], [3, 2, 1], [3, 2, -1], [3, -1, -1], [3, -1, -1]]


def test_entropy_runs_from_nothing_to_that_of_equal_experts() -> None:
    entropy_N = router_entropy(torch.tensor([[0.0, 0.0, 0.0, 0.0], [900.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(entropy_N, torch.tensor([math.log(4), 0.0]))
