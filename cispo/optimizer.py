"""AdamW on float32 master weights, whatever the dtype that the policy computes in.

A float32 parameter is its own master. Any other has a float32 copy that the updates are made on and that is rounded
back into the parameter after each; its gradients are added up in float32 over micro batches. Nothing here waits for the
device: norms stay tensors until somebody reads them.

Where a learner has several ranks, each has masters and moments of its own shards alone, and norms, states and weights
are of all of them: what is collective below must be called by every rank.
"""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from cispo.broadcast import checksum_of
from cispo.errors import CheckpointError
from cispo.kernels.digest import Part, digests
from cispo.parallel.parallelise import local
from cispo.parallel.ranks import ALONE, Ranks
from cispo.parallel.shards import Shard

_MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterAdamW:
    """AdamW (arXiv 1711.05101) over a module's trainable parameters; weight decay spares those of one dimension.

    An update is: any number of `loss.backward()` each followed by `collect()`, then `clip()`, then `update()`.
    ranks, shards: who else has parts of the module, and which, as `cispo.parallel.parallelise` gave them.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        ranks: Ranks = ALONE,
        shards: Mapping[str, Shard] | None = None,
    ) -> None:
        self._ranks = ranks
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._shards = dict(shards or {name: Shard(p.shape) for name, p in self._parameters.items()})
        self._masters = {name: _master(p) for name, p in self._parameters.items()}
        decayed = [master for master in self._masters.values() if master.dim() > 1]
        spared = [master for master in self._masters.values() if master.dim() <= 1]
        self._adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}],
            betas=betas,
            eps=eps,
            fused=True,
        )
        self.updates = 0
        for master in self._masters.values():
            self._adamw.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{moment: torch.zeros_like(master) for moment in _MOMENTS},
            }

    def collect(self) -> None:
        """Move the gradients of the last backward pass into the masters' float32 sums."""
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if parameter is master or parameter.grad is None:
                continue
            gradient = local(parameter.grad).float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to a global norm of max_norm; collective.

        Returns the norm before it, a float32 scalar tensor.
        """
        masters = list(self._masters.values())
        norm = self._norm() if self._ranks.is_alone else self._norm_over_ranks()
        if max_norm != float("inf"):
            nn.utils.clip_grads_with_norm_(masters, max_norm, norm)
        return norm

    @torch.no_grad()
    def update(self, learning_rate: float) -> None:
        """One AdamW update with the collected gradients, which are then forgotten."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        for master in self._masters.values():
            if master.grad is None:
                # A parameter that took no part has a gradient of zero, so that its moments decay like all others.
                master.grad = torch.zeros_like(master)
        self._adamw.step()
        # The fused step changes parameters without counting it, and packed copies of them are kept by that count.
        torch.autograd.graph.increment_version(list(self._masters.values()))
        self.forget()
        self._round_into_parameters()
        self.updates += 1

    def forget(self) -> None:
        """Drop the collected gradients."""
        for name, parameter in self._parameters.items():
            parameter.grad = None
            self._masters[name].grad = None

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole weights, in the dtype that the policy computes in, one after the other; collective.

        Those in use where there is one rank. The others must be iterated over to the end, by every rank.
        """
        for name, parameter in self._parameters.items():
            yield name, self._shards[name].gather(local(parameter.detach()), self._ranks)

    def weight_sizes(self) -> dict[str, int]:
        """Bytes of each whole weight, in the order and dtype of `parameters`."""
        return {name: self._shards[name].shape.numel() * p.itemsize for name, p in self._parameters.items()}

    def weights_checksum(self) -> str:
        """`cispo.broadcast.weights_checksum` of the whole weights, in the dtype they are computed in; collective.

        None is gathered: ranks add up the digests of what they hold.
        """
        sums_P = digests([self._part(name, parameter) for name, parameter in self._parameters.items()])
        kinds = {name: (self._shards[name].shape, p.dtype) for name, p in self._parameters.items()}
        return checksum_of(kinds, self._ranks.add_up(sums_P))

    def state_dict(self) -> dict[str, Tensor]:
        """Masters, moments and the update count by name, for safetensors; collective.

        The tensors are those in use, not copies. Of several ranks, the first gets them whole, on the CPU, whatever the
        number of ranks; the others get none.
        """
        state = {"updates": torch.tensor(self.updates)}
        for name, tensor in self._own_state():
            whole = self._shards[name.partition("/")[2]].gather(tensor, self._ranks)
            if self._ranks.is_alone:
                state[name] = whole
            elif self._ranks.rank == 0:
                state[name] = whole.cpu()
        return state if self._ranks.rank == 0 else {}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on exactly where `state_dict` was taken, with any number of ranks; all of them take the same state.

        CheckpointError when names or shapes are another model's.
        """
        own = dict(self._own_state())
        shapes = {name: self._shards[name.partition("/")[2]].shape for name in own} | {"updates": torch.Size(())}
        wrong = sorted(shapes.keys() ^ state.keys()) or sorted(n for n in shapes if shapes[n] != state[n].shape)
        if wrong:
            raise CheckpointError(
                f"the optimiser state does not fit the policy ({len(wrong)} names or shapes differ, first {wrong[0]}); "
                "resume with the policy that wrote it"
            )
        self.updates = int(state["updates"])
        for name, tensor in own.items():
            tensor.copy_(self._shards[name.partition("/")[2]].cut(state[name], self._ranks.rank))
        for master in self._masters.values():
            self._adamw.state[master]["step"].fill_(self.updates)
        self._round_into_parameters()

    def _part(self, name: str, parameter: nn.Parameter) -> Part:
        """Of a weight, what this rank answers for; the first for what all have."""
        shard, held, rank = self._shards[name], local(parameter.detach()), self._ranks.rank
        if shard.bounds is None:
            return Part(held if rank == 0 else held[:0])
        return Part.of(held, shard.shape, shard.dim, shard.bounds[rank][0])

    def _own_state(self) -> Iterator[tuple[str, Tensor]]:
        """Masters and moments as this rank has them."""
        for name, master in self._masters.items():
            yield f"master/{name}", master.detach()
            for moment in _MOMENTS:
                yield f"{moment}/{name}", self._adamw.state[master][moment]

    def _round_into_parameters(self) -> None:
        for name, parameter in self._parameters.items():
            held, master = local(parameter), self._masters[name]
            # A float32 master is the parameter's own memory, unless its owner has moved it since.
            if held.dtype is not master.dtype or held.data_ptr() != master.data_ptr():
                held.copy_(master)

    def _norm(self, names: Collection[str] | None = None) -> Tensor:
        masters = [master for name, master in self._masters.items() if names is None or name in names]
        return nn.utils.get_total_norm([master.grad for master in masters if master.grad is not None])

    def _norm_over_ranks(self) -> Tensor:
        """Of the gradients of all ranks; those of weights that every rank has are added up first."""
        shared = [name for name, shard in self._shards.items() if shard.bounds is None and name in self._masters]
        masters = [self._masters[name] for name in shared]
        if masters:
            parts = [torch.zeros_like(m) if m.grad is None else m.grad for m in masters]
            total = self._ranks.add_up(torch.cat([part.flatten() for part in parts]))
            for master, gradient in zip(masters, total.split([m.numel() for m in masters]), strict=True):
                master.grad = gradient.view_as(master)
        counted = self._masters.keys() - (shared if self._ranks.rank else [])
        square = self._norm(counted).double().square().to(next(iter(self._masters.values())).device)
        return self._ranks.add_up(square).sqrt().float()


@torch.no_grad()
def _master(parameter: nn.Parameter) -> nn.Parameter:
    held = local(parameter)
    if held is parameter and parameter.dtype is torch.float32:
        return parameter
    return nn.Parameter(held.float())
