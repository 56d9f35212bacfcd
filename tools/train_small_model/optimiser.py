"""Float32 masters of a bfloat16 model, stepped by Muon (hidden matrices) and AdamW (the rest).

Muon (Jordan et al., 2024) takes the momentum of a matrix and makes all its singular values about
one before stepping.  Matrices of one shape are stacked and done together, which on a CPU takes
a little more than half as long as one after the other.
"""

from collections import defaultdict
from typing import Any

import torch

MOMENTUM = 0.95
DECAY = 0.02


def orthogonal(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Near-orthogonal versions of a stack of matrices, by Newton and Schulz's iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Masters:
    """The weights as float32, and one step of all of them."""

    def __init__(self, model: torch.nn.Module, rate: float, adam_rate: float) -> None:
        self.live = dict(model.named_parameters())
        self.rate, self.adam_rate = rate, adam_rate
        alike: dict[str, list[str]] = defaultdict(list)
        self.others: dict[str, torch.Tensor] = {}
        for name, weight in self.live.items():
            if weight.ndim == 2 and "embed" not in name:
                part = "tongue" if "language_model" in name else "eyes"
                alike[f"{part} {tuple(weight.shape)}"].append(name)
            else:
                self.others[name] = weight.detach().float().clone()
        self.stacks = {
            key: (
                names,
                torch.stack([self.live[n].detach().float() for n in names]),
                torch.zeros(
                    len(names), *self.live[names[0]].shape, device=self.live[names[0]].device
                ),
            )
            for key, names in alike.items()
        }
        self.adam = torch.optim.AdamW(
            list(self.others.values()),
            lr=adam_rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=next(iter(self.others.values())).is_cuda,
        )

    def attach(self, model: torch.nn.Module) -> None:
        """Write to this model's weights from now on."""
        self.live = dict(model.named_parameters())
        self.write()

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at ``factor`` of the full rates; the live weights follow.

        Weights without a gradient (the language model, while only the eyes learn) stay.
        """
        for name, master in self.others.items():
            grad = self.live[name].grad
            master.grad = None if grad is None else grad.float()
        torch.nn.utils.clip_grad_norm_(self.others.values(), 1.0)
        self.adam.param_groups[0]["lr"] = self.adam_rate * factor
        self.adam.step()
        for names, master, momentum in self.stacks.values():
            if self.live[names[0]].grad is None:
                continue
            grads = torch.stack([_grad(self.live[n]) for n in names]).float()
            momentum.lerp_(grads, 1 - MOMENTUM)
            update = orthogonal(grads.lerp_(momentum, MOMENTUM))
            rows, columns = master.shape[-2:]
            step = self.rate * factor * max(1.0, rows / columns) ** 0.5
            master.mul_(1 - DECAY * self.rate * factor).add_(update, alpha=-step)
        for weight in self.live.values():
            weight.grad = None
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Copy the masters into the live weights."""
        weights = self.weights()
        torch._foreach_copy_([self.live[name] for name in weights], list(weights.values()))

    def weights(self) -> dict[str, torch.Tensor]:
        """All float32 weights by name."""
        found = dict(self.others)
        for names, master, _ in self.stacks.values():
            found |= dict(zip(names, master, strict=True))
        return found

    def state(self) -> dict[str, Any]:
        """All that is needed to go on."""
        momenta: dict[str, torch.Tensor] = {}
        for names, _, momentum in self.stacks.values():
            momenta |= dict(zip(names, momentum, strict=True))
        return {"weights": self.weights(), "momenta": momenta, "adam": self.adam.state_dict()}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        for name, master in self.others.items():
            master.copy_(state["weights"][name])
        for names, master, momentum in self.stacks.values():
            master.copy_(torch.stack([state["weights"][n] for n in names]))
            momentum.copy_(torch.stack([state["momenta"][n] for n in names]))
        self.adam.load_state_dict(state["adam"])
        self.write()


def _grad(weight: torch.Tensor) -> torch.Tensor:
    assert weight.grad is not None
    return weight.grad
