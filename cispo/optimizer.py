"""AdamW on float32 master weights, whatever the dtype that the policy computes in.

A float32 parameter is its own master. Any other has a float32 copy that the updates are made on and that is rounded
back into the parameter after each; its gradients are added up in float32 over micro batches. Nothing here waits for the
device: norms stay tensors until somebody reads them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cispo.errors import CheckpointError

_MOMENTS = ("exp_avg", "exp_avg_sq")


class MasterAdamW:
    """AdamW (arXiv 1711.05101) over a module's trainable parameters; weight decay spares those of one dimension.

    An update is: any number of `loss.backward()` each followed by `collect()`, then `clip()`, then `update()`.
    """

    def __init__(self, module: nn.Module, *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._masters = {
            name: p if p.dtype is torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self._parameters.items()
        }
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
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to a global norm of max_norm; the norm before it, a float32 scalar tensor."""
        masters = list(self._masters.values())
        norm = nn.utils.get_total_norm([master.grad for master in masters if master.grad is not None])
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
        for name, parameter in self._parameters.items():
            if parameter is not self._masters[name]:
                parameter.copy_(self._masters[name])
        self.updates += 1

    def forget(self) -> None:
        """Drop the collected gradients."""
        for name, parameter in self._parameters.items():
            parameter.grad = None
            self._masters[name].grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Masters, moments and the update count by name, for safetensors; the tensors are those in use, not copies."""
        state = {"updates": torch.tensor(self.updates)}
        for name, master in self._masters.items():
            state[f"master/{name}"] = master.detach()
            for moment in _MOMENTS:
                state[f"{moment}/{name}"] = self._adamw.state[master][moment]
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on exactly where `state_dict` was taken; CheckpointError when names or shapes are another model's."""
        own = self.state_dict()
        wrong = sorted(own.keys() ^ state.keys()) or sorted(n for n in own if own[n].shape != state[n].shape)
        if wrong:
            raise CheckpointError(
                f"the optimiser state does not fit the policy ({len(wrong)} names or shapes differ, first {wrong[0]}); "
                "resume with the policy that wrote it"
            )
        self.updates = int(state["updates"])
        for name, tensor in own.items():
            if name != "updates":
                tensor.copy_(state[name])
        for name, master in self._masters.items():
            self._adamw.state[master]["step"].fill_(self.updates)
            if self._parameters[name] is not master:
                self._parameters[name].copy_(master)
