"""The load-balancing loss of a mini batch and the metrics of routers, for `cispo train` and `cispo sft`.

The loss is a product of two means over the mini batch, the choices of each expert and its gate probability. The first
has to be known before any backward, or the result would depend on the split into micro batches.

Shape suffixes: L layers that have a router, E experts, K experts a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cispo.model.config import ModelConfig
from cispo.model.router_sums import RouterSums, load_balancing_loss
from cispo.parallel.ranks import ALONE, Ranks


class Packed(Protocol):
    """What is asked of a micro batch here: its packed tokens."""

    @property
    def ids_N(self) -> Tensor: ...


Micro = TypeVar("Micro", bound=Packed)


@dataclass(frozen=True, slots=True, eq=False)
class RouterBalance:
    """What the micro batches of a mini batch share: the rows that it routes, and its load_E if they are several."""

    rows: int
    load_E: Tensor | None

    @classmethod
    def of(
        cls,
        micros: Sequence[Micro],
        config: ModelConfig,
        device: torch.device,
        route: Callable[[Micro, RouterSums], object],
        ranks: Ranks = ALONE,
    ) -> "RouterBalance":
        """route: a forward over a micro batch that fills the sums, or, for a filler, does not.

        It is run, without gradients, unless there is one micro batch in all. Collective, where there are more ranks.
        """
        if len(micros) == 1 and ranks.is_alone:
            return cls(len(micros[0].ids_N) * len(config.routed_layers), None)
        sums = RouterSums(config, device, for_loss=True)
        with torch.no_grad():
            for micro in micros:
                route(micro, sums)
        return cls._of_choices(sums.choices_LE.sum(0), config.experts_per_token, ranks)

    @classmethod
    def of_replayed(
        cls, ids_NLK: Sequence[Tensor], config: ModelConfig, device: torch.device, ranks: Ranks = ALONE
    ) -> "RouterBalance":
        """The same where the experts of every micro batch are replayed, and so are known without a forward."""
        choices_E = torch.zeros(config.experts, dtype=torch.int64)
        for ids in ids_NLK:
            choices_E += torch.bincount(ids.flatten(), minlength=config.experts)
        return cls._of_choices(choices_E.to(device), config.experts_per_token, ranks)

    @classmethod
    def _of_choices(cls, choices_E: Tensor, experts_per_token: int, ranks: Ranks) -> "RouterBalance":
        choices_E = ranks.add_up(choices_E)
        rows = int(choices_E.sum()) // experts_per_token
        return cls(rows, (choices_E.double() / rows).float())

    def loss(self, sums: RouterSums) -> Tensor:
        """A micro batch's part of the loss, before the coefficient; the parts add up to the mini batch's."""
        load_E = _load(sums, self.rows) if self.load_E is None else self.load_E
        return load_balancing_loss(load_E, sums.probability_E, self.rows)


def _load(sums: RouterSums, rows: int) -> Tensor:
    return (sums.choices_LE.sum(0).double() / rows).float()


class RouterTotals:
    """What routers did since the last line of metrics; kept on the device until it is due."""

    def __init__(self) -> None:
        self._choices_LE: Tensor | None = None
        self._entropy: Tensor | float = 0.0
        self._differing: Tensor | float = 0.0
        self._loss: Tensor | None = None
        self._replayed = 0
        self._experts_per_token = 0

    def add(self, sums: RouterSums, loss: Tensor | None) -> None:
        """Add one micro batch; loss: its part of the load-balancing loss, if there is one."""
        self._choices_LE = sums.choices_LE + (0 if self._choices_LE is None else self._choices_LE)
        self._entropy = self._entropy + sums.entropy
        self._differing = self._differing + sums.differing
        self._replayed += sums.replayed
        self._experts_per_token = sums.experts_per_token
        if loss is not None:
            self._loss = loss.detach().double() + (0.0 if self._loss is None else self._loss)

    def merge(self, ranks: Ranks) -> None:
        """Add what the routers of the other ranks did; collective."""
        own = None
        if self._choices_LE is not None:
            loss = None if self._loss is None else self._loss.cpu()
            sums = self._choices_LE.cpu(), float(self._entropy), float(self._differing)
            own = *sums, self._replayed, self._experts_per_token, loss
        held = [totals for totals in ranks.gather_objects(own) if totals is not None]
        if not held or ranks.is_alone:
            return
        choices, entropies, differing, replayed, per_token, losses = zip(*held, strict=True)
        self._choices_LE = torch.stack(choices).sum(0)
        self._entropy, self._differing, self._replayed = sum(entropies), sum(differing), sum(replayed)
        self._experts_per_token = per_token[0]
        known = [loss for loss in losses if loss is not None]
        self._loss = torch.stack(known).sum(0) if known else None

    def metrics(self, updates: int) -> dict[str, float]:
        """Their metrics, over so many updates; nothing if nothing was added."""
        if self._choices_LE is None:
            return {}
        choices_LE = self._choices_LE.double().cpu()
        metrics = {
            "router/max_load": float((choices_LE.amax(1) / choices_LE.mean(1)).max()),
            "router/entropy": float(self._entropy) * self._experts_per_token / float(choices_LE.sum()),
        }
        if self._replayed:
            metrics["router/frac_differing"] = float(self._differing) / self._replayed
        if self._loss is not None:
            metrics["loss/router_aux"] = float(self._loss) / updates
        return metrics
