"""Supermask: masks drawn from learned probabilities (Zhou et al. 2019), as a ``torch.optim.Optimizer``."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from jackpot_kernels._validate import require_choice, require_number, require_seed
from jackpot_kernels.budgets import kept_masks
from jackpot_kernels.convert import searched_layers
from jackpot_kernels.ops.pack_mask import unpack_mask
from jackpot_kernels.search.optimizer import SCOPES, SwapStats


class Supermask(torch.optim.Optimizer):
    """Search masks by SGD on the logits of the probability that a weight is kept.

    >>> optimizer = Supermask(model)
    >>> for x, y in loader:
    ...     optimizer.zero_grad()
    ...     optimizer.draw()
    ...     loss_fn(model(x), y).backward()
    ...     optimizer.step()

    ``draw`` gives every layer ``mask ~ Bernoulli(sigmoid(scores))``, fresh at each step. ``step`` descends
    along ``G * weight * sigmoid'(scores)`` with ``G = dL/d(weight * mask)``, which passes the draw straight
    through, and leaves the masks at the K highest probabilities, ties lowest logical index. So between steps
    a model is what it would be if the search ended there, K being what its masks kept when the optimizer was
    made.

    Weights never change. The first scores are those that the layers have: after ``initialize`` (Eq. 8) a
    probability of ``sigmoid(1) = 0.73`` for kept weights and of ``sigmoid(eta)`` for pruned ones. Nothing
    holds drawn masks to K: they keep what the probabilities say, so running statistics of normalisation that
    follow them do not fit the K best and should be recalibrated. The slope of the sigmoid makes the gradients
    at least four times smaller than those of ``SRPopup``, so learning rates are larger.

    Args:
        model: a module with masked layers; scores that require a gradient are searched.
        lr, momentum, weight_decay: as in ``torch.optim.SGD``; 100 is what Zhou et al. took.
        scope: "layer" keeps each layer's count, "global" that of all layers together.
        seed: the draw of a step depends on seed, step and the kind of device alone.

    Raises:
        TypeError: when an argument has a wrong type.
        ValueError: when there is no layer to search or an argument is out of its range.

    A step with a NaN or infinite gradient changes nothing but ``skipped_steps``. Each step waits for the
    device.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 100.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        scope: str = "layer",
        seed: int = 0,
    ) -> None:
        require_choice("scope", scope, SCOPES)
        layers = searched_layers(model)
        hyper = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        for name, value in hyper.items():
            require_number(name, value)
        super().__init__([layer.scores for layer in layers.values()], hyper)
        self._layers, self._joint = layers, scope == "global"
        for layer in layers.values():
            self.state[layer.scores]["momentum_buffer"] = torch.zeros_like(layer.scores)
        kept = [layer.num_kept for layer in layers.values()]
        # All that a resume needs besides groups and momentum.
        self._search: dict[str, Any] = {
            "num_kept": [sum(kept)] if self._joint else kept,
            "seed": require_seed(seed),
            "steps": 0,
            "skipped_steps": 0,
        }
        self._best = self._previous = self._words()

    def draw(self) -> None:
        """Give every layer the mask that this step draws."""
        device = next(iter(self._layers.values())).scores.device
        seed = (self._search["seed"] * 1_000_003 + self._search["steps"]) % 2**63
        generator = torch.Generator(device).manual_seed(seed)
        for layer in self._layers.values():
            draw = torch.rand(layer.scores.shape, generator=generator, dtype=torch.float32, device=device)
            layer.mask = draw < layer.scores.detach().sigmoid()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the scores and keep the best; a layer whose gradient is None keeps its scores.

        Args:
            closure: computes the loss and its gradients anew.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [layer.scores.grad for layer in self._layers.values()]
        if all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients):
            self._descend()
            self._search["steps"] += 1
        else:
            self._search["skipped_steps"] += 1
        self._keep_best()
        return loss

    def _descend(self) -> None:
        for group in self.param_groups:
            for scores in group["params"]:
                if scores.grad is not None:
                    probability = scores.sigmoid()
                    gradient = scores.grad * (probability * (1 - probability))
                    gradient += group["weight_decay"] * scores
                    momentum = self.state[scores]["momentum_buffer"]
                    momentum.mul_(group["momentum"]).add_(gradient)
                    scores.sub_(group["lr"] * momentum)

    def _keep_best(self) -> None:
        """Select by logits, which rank as their probabilities do and tie less often in float32."""
        scores = [layer.scores.detach() for layer in self._layers.values()]
        best = kept_masks(scores, self._search["num_kept"], self._joint)
        for layer, mask in zip(self._layers.values(), best, strict=True):
            layer.mask = mask
        self._previous, self._best = self._best, self._words()

    def _words(self) -> list[Tensor]:
        return [layer.mask_words.clone() for layer in self._layers.values()]

    def stats(self) -> dict[str, SwapStats]:
        """Return how many weights of each layer the last step brought among the K best, as swaps granted.

        The threshold is the lowest score there. In the global scope it is under the key "global", for all
        layers together.
        """
        rows = {}
        for (name, layer), best, previous in zip(
            self._layers.items(), self._best, self._previous, strict=True
        ):
            shape = layer.weight.shape
            kept, before = unpack_mask(best, shape), unpack_mask(previous, shape)
            rows[name] = (
                int((kept & ~before).sum()),
                float(layer.scores.detach()[kept].min()) if kept.any() else math.inf,
            )
        if self._joint:
            rows = {"global": (sum(n for n, _ in rows.values()), min(t for _, t in rows.values()))}
        return {name: SwapStats(n, n, 0, threshold) for name, (n, threshold) in rows.items()}

    @property
    def steps(self) -> int:
        """Number of steps taken, skipped ones left out."""
        return int(self._search["steps"])

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped because a gradient was not finite."""
        return int(self._search["skipped_steps"])

    def state_dict(self) -> dict[str, Any]:
        """Return groups and momentum as every optimizer does, and under "search" all else a resume needs."""
        return {**super().state_dict(), "search": dict(self._search)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a search in its middle, bit for bit, once the model has loaded its own state too.

        Raises:
            ValueError: when it is of another search; nothing has changed then.
        """
        search = state_dict.get("search")
        if not isinstance(search, dict) or search.keys() != self._search.keys():
            raise ValueError("state_dict must come from Supermask.state_dict(), got another one")
        if search["num_kept"] != self._search["num_kept"]:
            wanted = self._search["num_kept"]
            raise ValueError(f"num_kept of state_dict must be {wanted}, got {search['num_kept']}")
        super().load_state_dict(state_dict)
        # Copies, so that the next step leaves the caller's tensors alone.
        for entry in self.state.values():
            entry["momentum_buffer"] = entry["momentum_buffer"].clone()
        self._search = dict(search)
        self._best = self._previous = self._words()
