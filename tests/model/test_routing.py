"""What a caller asks of the routers, in one forward, in prefill and in decode."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cispo.kernels.routing import choose, route, router_entropy, router_logits
from cispo.model.checkpoint import load_policy
from cispo.model.config import ModelConfig
from cispo.model.decoder import Decoder, Experts
from cispo.model.families import read_hf_config
from cispo.model.routing import ExpertRecord, RoutingControl, RoutingLog

LENGTHS = (30, 1, 65, 12)


@pytest.fixture(scope="module")
def decoder(small_policy_folder: Path) -> Decoder:
    return load_policy(small_policy_folder, dtype=torch.float32, device="cpu")


def packed(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    lengths = [len(sequence) for sequence in sequences]
    positions_N = torch.cat([torch.arange(length) for length in lengths])
    return torch.cat(list(sequences)), positions_N, torch.tensor([0, *lengths]).cumsum(0).int()


def random_sequences(config: ModelConfig, lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, config.vocabulary_size, (n,), generator=generator) for n in lengths]


def router_inputs(decoder: Decoder, inputs: tuple[Tensor, Tensor, Tensor]) -> list[tuple[Experts, Tensor]]:
    """Each layer's experts that have a router, with the rows that they read."""
    found: list[tuple[Experts, Tensor]] = []

    def keep(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if isinstance(module, Experts) and module.router is not None:
            found.append((module, arguments[0].detach()))

    hooks = [module.register_forward_pre_hook(keep) for module in decoder.modules() if isinstance(module, Experts)]
    try:
        decoder(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def expected_log(decoder: Decoder, sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """tokens_BLE and mean_entropy_BL, from the rows that each router reads."""
    tokens, entropies = [], []
    for sequence in sequences:
        layers = router_inputs(decoder, packed([sequence]))
        logits = [router_logits(x_ND, experts.router) for experts, x_ND in layers if experts.router is not None]
        chosen = [choose(logits_NE, decoder.config.experts_per_token).flatten() for logits_NE in logits]
        tokens.append(torch.stack([torch.bincount(ids, minlength=decoder.config.experts) for ids in chosen]))
        entropies.append(torch.stack([router_entropy(logits_NE).mean() for logits_NE in logits]).double())
    return torch.stack(tokens), torch.stack(entropies)


def assert_logged(log: RoutingLog, decoder: Decoder, sequences: list[Tensor]) -> None:
    tokens_BLE, entropy_BL = expected_log(decoder, sequences)
    assert torch.equal(log.tokens_BLE, tokens_BLE)
    torch.testing.assert_close(log.mean_entropy_BL, entropy_BL, rtol=1e-5, atol=1e-6)
    layers = len(decoder.config.routed_layers)
    assert torch.equal(log.routed_BL, torch.tensor([[len(sequence)] * layers for sequence in sequences]))


@pytest.mark.parametrize("is_training", [True, False])
def test_the_log_counts_what_routers_decide_and_changes_nothing(decoder: Decoder, is_training: bool) -> None:
    sequences = random_sequences(decoder.config)
    log = RoutingLog(decoder.config, len(sequences))
    with torch.set_grad_enabled(is_training):
        logged = decoder(*packed(sequences), routing=RoutingControl(log=log))
        assert torch.equal(logged, decoder(*packed(sequences)))
    assert_logged(log, decoder, sequences)


@torch.inference_mode()
def test_the_log_adds_up_over_prefill_and_decode(decoder: Decoder) -> None:
    sequences = random_sequences(decoder.config, (20, 70, 66))
    prompts = [10, 60, 56]
    log = RoutingLog(decoder.config, 4)
    cache = decoder.new_cache(capacity=3, max_tokens=128)
    control = RoutingControl(log=log, log_sequences=(3, 0, 1))
    heads = [sequence[:prompt] for sequence, prompt in zip(sequences, prompts, strict=True)]
    decoder(*packed(heads), cache.extend(range(3), prompts), routing=control)
    for at in range(10):
        step = cache.begin_step(np.arange(3))
        ids_B = torch.stack([s[p + at] for s, p in zip(sequences, prompts, strict=True)] + [torch.tensor(0)])
        decoder.decode(ids_B, step, cache, control)
    assert not log.tokens_BLE[2].any(), "an idle row is nobody's"
    in_order = RoutingLog(decoder.config, 3)
    decoder(*packed([sequences[i] for i in (1, 2, 0)]), routing=RoutingControl(log=in_order))
    assert torch.equal(log.tokens_BLE[[0, 1, 3]], in_order.tokens_BLE)
    torch.testing.assert_close(log.mean_entropy_BL[[0, 1, 3]], in_order.mean_entropy_BL)
    assert_logged(in_order, decoder, [sequences[i] for i in (1, 2, 0)])


def test_the_last_layer_logs_the_rows_that_are_asked_for(decoder: Decoder) -> None:
    sequences = random_sequences(decoder.config)
    log = RoutingLog(decoder.config, len(sequences))
    decoder(*packed(sequences), rows_M=torch.tensor([3, 30, 31, 90]), routing=RoutingControl(log=log))
    assert log.routed_BL[:, -1].tolist() == [1, 1, 2, 0]
    assert log.routed_BL[:, 0].tolist() == list(LENGTHS)
    assert log.mean_entropy_BL[3, -1].isnan()


def test_dense_layers_have_no_place_in_the_log(family_configs: dict[str, dict[str, object]]) -> None:
    config = read_hf_config(family_configs["qwen3_moe"] | {"model_type": "qwen3_moe"})
    assert config.routed_layers == (0, 2, 3)
    model = Decoder(config)
    model.initialise(0)
    sequences = random_sequences(config)
    log = RoutingLog(config, len(sequences))
    model(*packed(sequences), routing=RoutingControl(log=log))
    assert_logged(log, model, sequences)


@torch.inference_mode()
def test_thresholds_are_those_of_each_sequence_in_every_phase(decoder: Decoder) -> None:
    sequences = random_sequences(decoder.config, (30, 30, 30))
    thresholds = (0.0, 0.3, 0.99)
    log = RoutingLog(decoder.config, 3)
    together = decoder(*packed(sequences), routing=RoutingControl(expert_thresholds=thresholds, log=log)).split(30)
    for sequence, threshold, rows in zip(sequences, thresholds, together, strict=True):
        alone = decoder(*packed([sequence]), routing=RoutingControl(expert_thresholds=[threshold]))
        assert torch.equal(alone, rows)
        assert torch.equal(alone, decoder(*packed([sequence]))) == (threshold == 0)
    routed = log.tokens_BLE.sum(-1)
    assert (routed[0] == 60).all() and (routed[2] == 30).all()
    assert 90 < int(routed[1].sum()) < 60 * len(decoder.config.routed_layers)
    cache = decoder.new_cache(capacity=3, max_tokens=64)
    control = RoutingControl(expert_thresholds=thresholds)
    decoder(*packed([s[:29] for s in sequences]), cache.extend(range(3), [29] * 3), routing=control)
    step = cache.begin_step(np.arange(3))
    ids_B = torch.stack([*(sequence[29] for sequence in sequences), torch.tensor(0)])
    decoded = decoder.decode(ids_B, step, cache, control)
    for row, rows in zip(decoded, together, strict=False):
        assert torch.equal(row, rows[-1])


def test_a_threshold_takes_its_experts_out_of_the_first_layer(decoder: Decoder) -> None:
    sequences = random_sequences(decoder.config, (40,))
    log = RoutingLog(decoder.config, 1)
    decoder(*packed(sequences), routing=RoutingControl(expert_thresholds=[0.4], log=log))
    experts, x_ND = router_inputs(decoder, packed(sequences))[0]
    assert experts.router is not None
    routing = route(router_logits(x_ND, experts.router), 2, threshold_N=torch.full((40,), 0.4))
    kept = routing.kept_ids_NK[routing.kept_ids_NK >= 0]
    assert len(kept) < 80
    assert torch.equal(log.tokens_BLE[0, 0], torch.bincount(kept, minlength=decoder.config.experts))


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_a_threshold_outside_its_range_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got"):
        RoutingControl(expert_thresholds=[0.2, threshold])


def test_recorded_experts_are_taken_again_with_the_same_bits_and_gradients(decoder: Decoder) -> None:
    sequences = random_sequences(decoder.config)
    rows_M = torch.tensor([3, 30, 31, 90])
    record = ExpertRecord(decoder.config)
    recorded = decoder(*packed(sequences), rows_M=rows_M, routing=RoutingControl(record=record))
    ids_NLK = record.ids_NLK
    assert ids_NLK.dtype == torch.uint8
    assert ids_NLK.shape == (sum(LENGTHS), len(decoder.config.routed_layers), 2)
    replay = RoutingControl(replayed_ids_NLK=ids_NLK)
    results = []
    for control in (None, replay):
        hidden_MD = decoder(*packed(sequences), rows_M=rows_M, routing=control)
        gradients = torch.autograd.grad(hidden_MD.square().sum(), list(decoder.parameters()), allow_unused=True)
        results.append([hidden_MD, *(gradient for gradient in gradients if gradient is not None)])
    assert torch.equal(recorded, results[0][0])
    assert len(results[0]) > len(list(decoder.parameters())) - 2
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_replayed_experts_stay_when_the_router_changes(decoder: Decoder, small_policy_folder: Path) -> None:
    sequences = random_sequences(decoder.config)
    record = ExpertRecord(decoder.config)
    before = RoutingLog(decoder.config, len(sequences))
    decoder(*packed(sequences), routing=RoutingControl(record=record, log=before))
    moved = load_policy(small_policy_folder, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if name.endswith("router"):
                parameter.neg_()
    counts = []
    for ids_NLK in (None, record.ids_NLK):
        log = RoutingLog(moved.config, len(sequences))
        hidden_ND = moved(*packed(sequences), routing=RoutingControl(log=log, replayed_ids_NLK=ids_NLK))
        counts.append(log.tokens_BLE)
    assert not torch.equal(counts[0], before.tokens_BLE)
    assert torch.equal(counts[1], before.tokens_BLE)
    moved.zero_grad()
    torch.autograd.backward(hidden_ND.square().sum())
    for experts in moved.modules():
        if isinstance(experts, Experts):
            assert experts.router is not None and experts.router.grad is not None
            assert experts.router.grad.abs().sum() > 0, "the router learns through the weights of the replayed experts"


def test_a_record_over_prefill_and_decode_is_that_of_one_forward(decoder: Decoder) -> None:
    sequences = random_sequences(decoder.config, (20, 70, 66))
    record = ExpertRecord(decoder.config)
    control = RoutingControl(record=record)
    decoder(*packed(sequences), routing=control)
    wanted = record.ids_NLK.split([20, 70, 66])
    with torch.inference_mode():
        cache = decoder.new_cache(capacity=3, max_tokens=128)
        heads = [sequence[:-2] for sequence in sequences]
        decoder(*packed(heads), cache.extend(range(3), [18, 68, 64]), routing=control)
        for ids_TLK, all_TLK in zip(record.ids_NLK.split([18, 68, 64]), wanted, strict=True):
            assert torch.equal(ids_TLK, all_TLK[:-2])
        for at in (-2, -1):
            step = cache.begin_step(np.arange(3))
            ids_B = torch.stack([*(sequence[at] for sequence in sequences), torch.tensor(0)])
            decoder.decode(ids_B, step, cache, control)
            assert torch.equal(record.ids_NLK[:3], torch.stack([all_TLK[at] for all_TLK in wanted]))


def test_what_cannot_be_replayed_is_refused(decoder: Decoder) -> None:
    sequences = random_sequences(decoder.config)
    with pytest.raises(ValueError, match=r"shape \(108, 4, 1\), but the tokens, routers and choices here are"):
        ids_NLK = torch.zeros(sum(LENGTHS), 4, 1, dtype=torch.uint8)
        decoder(*packed(sequences), routing=RoutingControl(replayed_ids_NLK=ids_NLK))
    with pytest.raises(ValueError, match="no record can be kept"):
        RoutingControl(expert_thresholds=[0.1], record=ExpertRecord(decoder.config))
    with torch.inference_mode(), pytest.raises(ValueError, match="not in a decode step"):
        cache = decoder.new_cache(capacity=4, max_tokens=64)
        decoder(*packed(sequences[1:2]), cache.extend([0], [1]))
        control = RoutingControl(replayed_ids_NLK=torch.zeros(4, 4, 2, dtype=torch.uint8))
        decoder.decode(torch.zeros(4, dtype=torch.int64), cache.begin_step(np.arange(1)), cache, control)


def test_ids_beyond_a_byte_take_two(family_configs: dict[str, dict[str, object]]) -> None:
    settings = family_configs["qwen3_moe"] | {"model_type": "qwen3_moe", "moe_intermediate_size": 1}
    for experts, dtype in ((256, torch.uint8), (257, torch.int16)):
        record = ExpertRecord(read_hf_config(settings | {"num_experts": experts}))
        record.add(0, torch.full((3, 2), experts - 1))
        assert record.ids_NLK.dtype == record.room(1, 1).dtype == dtype
        assert record.ids_NLK.max() == experts - 1
    dense = read_hf_config(family_configs["qwen3"] | {"model_type": "qwen3"})
    with pytest.raises(ValueError, match="no router"):
        ExpertRecord(dense)
