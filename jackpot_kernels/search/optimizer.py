"""SRPopup: short restriction popup (Algorithm 1 of arXiv 2104.08700) as a ``torch.optim.Optimizer``."""

import itertools
import math
import operator
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jackpot_kernels._validate import require_choice, require_number, require_seed, require_whole
from jackpot_kernels.budgets import num_pruned, scale_budget
from jackpot_kernels.convert import MaskedLayer, masked_layers, searched_layers
from jackpot_kernels.ops.pack_mask import unpack_mask
from jackpot_kernels.ops.search_step import SearchStep
from jackpot_kernels.ops.swap import PAIRS, new_workspace
from jackpot_kernels.search.captured import CapturedLayers
from jackpot_kernels.search.compat import AUTHORS, COMPAT, step_unless_tied
from jackpot_kernels.search.schedule import Schedule, constant, ramp_table, rate_table, step_table

SCOPES = ("layer", "global")

_HYPER = ("lr", "momentum", "weight_decay", "nesterov", "step_scale")
_hyper_of = operator.itemgetter(*_HYPER)
_version_of = operator.attrgetter("_version")


class SwapStats(NamedTuple):
    """What the last step did to a layer, or to all layers together in the global scope."""

    proposed: int
    granted: int
    skipped: int
    threshold: float


class SRPopup(torch.optim.Optimizer):
    """Search masks by SGD on the scores and a restricted number of swaps a step (Algorithm 1).

    Each step t updates all scores, ``g = grad + weight_decay * s; m = momentum * m + g; s = s - lr * m`` in
    float32 (Eq. 6, 18), finds the n pruned weights that now belong to the K highest scores (Eq. 28), and lets
    ``q = ceil(n * r(t))`` of them enter while as many kept ones leave (Eq. 29, 30). Weights never change, and
    a step waits for no device.

    K is what the masks keep when the optimizer is made; with ``final_sparsity`` it falls from there along
    ``ramp``. A step with a NaN or infinite gradient changes nothing but ``skipped_steps``.

    Args:
        model: a module with masked layers.
        lr: learning rate of the scores, a float or a tensor of one element; the value of one on the GPU is
            looked at here only, for later steps would wait for it.
        momentum, weight_decay, nesterov: as in ``torch.optim.SGD``.
        total_steps: number of steps of the search, t_f of Eq. 29.
        scope: "layer" ranks within each layer, "global" over all layers together.
        schedule: "quartic" (Eq. 29), "inverse" (Eq. 32), "constant" (rate 1: edge-popup), "single" (q = 1),
            or a function of ``t / total_steps`` that returns the rate in [0, 1].
        pairs: "best" swaps the highest entering for the lowest leaving scores (Eq. 30), "inverse" the other
            ends, "random" draws both.
        params: scores to search, in any form that ``torch.optim`` takes, with groups that may set ``lr``,
            ``momentum``, ``weight_decay``, ``nesterov`` and ``step_scale`` (which multiplies ``lr``); None
            takes all that require a gradient.
        final_sparsity: sparsity over the searched layers at the end, or kept weights by layer name.
        ramp: "cubic", "linear", or a function of the share of the ramp that has passed, falling to 0.
        ramp_end: when the ramp has ended, as a fraction of the search in (0, 1].
        swap_every: swap at every so many steps, and at the last.
        compat: "authors" does as their released code: the rate is 1 at every step, whatever ``schedule`` is,
            and a segment swaps nothing while its K-th and (K+1)-th highest scores are equal. Each step then
            waits for the device.
        seed: for ``pairs="random"``.

    Raises:
        TypeError: when an argument has a wrong type.
        ValueError: when there is no layer to search or an argument is out of its range.

    Equal scores rank by position, the lower first; in the global scope the layer's place in the model comes
    first. Given the same gradients, scores and masks have the same bits on every device and in every run.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        nesterov: bool = False,
        *,
        total_steps: int,
        scope: str = "layer",
        schedule: str | Schedule = "quartic",
        pairs: str = "best",
        params: Iterable[Any] | None = None,
        final_sparsity: float | Mapping[str, int] | None = None,
        ramp: str | Schedule = "cubic",
        ramp_end: float = 0.5,
        swap_every: int = 1,
        compat: str | None = None,
        seed: int = 0,
    ) -> None:
        require_choice("scope", scope, SCOPES)
        require_choice("pairs", pairs, PAIRS)
        seed = require_seed(seed)
        if compat is not None:
            require_choice("compat", compat, COMPAT)
            if final_sparsity is not None:
                raise ValueError(f"final_sparsity must be None with compat {compat!r}, got {final_sparsity}")
            schedule = constant
        rates, ramps = rate_table(schedule, total_steps), ramp_table(ramp, total_steps, ramp_end)
        layers, searched = masked_layers(model), searched_layers(model)
        _require_ordinary(layers)
        if params is None:
            params = [layer.scores for layer in searched.values()]
        super().__init__(params, dict(zip(_HYPER, (lr, momentum, weight_decay, nesterov, 1.0), strict=True)))
        names = _name_groups(self.param_groups, layers)
        self._model = model
        self._layers = {name: layer for name, layer in layers.items() if name in names}
        num_kept = _num_kept_rows(self._layers, final_sparsity, scope)  # [L, 2]
        for layer in self._layers.values():
            self.state[layer.scores]["momentum_buffer"] = torch.zeros_like(layer.scores)
        # All that a resume needs besides groups and momentum; state_dict() carries it as it stands here.
        self._search: dict[str, Any] = {
            "scope": scope,
            "pairs": pairs,
            "seed": seed,
            "schedule": AUTHORS if compat else _name_of(schedule),
            "total_steps": len(rates),
            "table": step_table(rates, ramps, swap_every),  # [T, 2]
            "num_kept": num_kept.sum(0, keepdim=True) if scope == "global" else num_kept,  # [S, 2]
            "control": torch.zeros(3, dtype=torch.int64),
        }
        self._bind()
        self._watch([layer.mask_words for layer in self._layers.values()])

    def _bind(self) -> None:
        """Collect once what every step needs, on the device of the scores."""
        layers = list(self._layers.values())
        device = _common_device(self._layers)
        for key in ("table", "num_kept", "control"):
            self._search[key] = self._search[key].to(device)
        self._device = device
        self._scores = [layer.scores for layer in layers]
        self._momenta = [self.state[scores]["momentum_buffer"] for scores in self._scores]
        # A module's attributes take ten times as long to read as these dicts.
        self._tensors: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (layer._parameters, layer._buffers) for layer in layers
        ]
        self._links = _links(self._model, self._layers)
        self._no_tensor = torch.empty(0, dtype=torch.float32, device=device)
        self._workspace = new_workspace(self._scores, self._joint)
        group_of = {id(scores): i for i, group in enumerate(self.param_groups) for scores in group["params"]}
        self._group_of_layer = torch.tensor([group_of[id(scores)] for scores in self._scores], device=device)
        self._group_rows: list[tuple[float, ...]] = []
        floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self._group_hyper = torch.zeros(len(self.param_groups), 5, **floats)  # [G, 5]
        self._hyper = torch.zeros(len(layers), 5, **floats)  # [L, 5]
        self._scaled = False
        self._stats = self._search["num_kept"].new_zeros(len(self._search["num_kept"]), 5)  # [S, 5]
        self._step: SearchStep | None = None
        self._capturing = False
        self._words: list[Tensor] = []
        self._versions: list[int] = []
        self._calls = self.steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the scores and swap once; a layer whose gradient is None keeps its scores.

        The first step warns of such layers.

        Args:
            closure: computes the loss and its gradients anew.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: past ``total_steps``, or when a layer was moved, replaced or given another number of
                kept weights since the optimizer was made; nothing has changed then.
            TypeError, ValueError: when a group was given what is no number, or one out of range; nothing has
                changed then.
        """
        try:
            return self._take_step(closure)
        except BaseException:
            # GradScaler takes these back from a step that ends well, and multiplies what it finds at the next
            # into its scale.
            for given in ("grad_scale", "found_inf"):
                vars(self).pop(given, None)
            raise

    def _take_step(self, closure: Callable[[], Any] | None) -> Any:
        self._require_steps_left()
        words = self._require_same_layers()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            words = self._require_same_layers()
        if not self._calls:
            self._warn_of_missing_gradients()
        self._write_hyper()
        step, gradients, found_inf = self._step_over(words), self._gradients(), self._found_inf()
        if self._search["schedule"] == AUTHORS:
            step_unless_tied(step, gradients, found_inf)
        else:
            step(gradients, found_inf)
        self._watch(words)
        self._calls += 1
        return loss

    @contextmanager
    def capturing(self) -> Iterator["CapturedSearch"]:
        """Let a CUDA graph capture ``step`` inside; it then happens at each replay inside its ``replaying``.

        Settings are written to the device beforehand, where a captured step reads them; and what would wait
        for the device is looked at beforehand.
        """
        self._require_steps_left()
        self._watch(self._require_same_layers())
        self._write_hyper()
        captured = CapturedSearch(self)
        calls, self._capturing = self._calls, True
        try:
            yield captured
            captured.look()
        finally:
            self._calls, self._capturing = calls, False

    def _present_words(self) -> list[Tensor]:
        return [buffers["mask_words"] for _, buffers in self._tensors]

    def stats(self) -> dict[str, SwapStats]:
        """Return what the last step did to each layer, or under the key "global" to all in the global scope.

        All is 0 before the first step and after one that was skipped. This waits for the device.
        """
        names = ["global"] if self._joint else list(self._layers)
        rows = zip(names, self._stats.tolist(), strict=True)
        return {name: SwapStats(n, q, n - q, _float32_of(bits)) for name, (n, q, _, bits, _) in rows}

    @property
    def steps(self) -> int:
        """Number of steps taken, skipped ones left out; reading it waits for the device."""
        return int(self._search["control"][0])

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped because a gradient was not finite; reading it waits for the device."""
        return int(self._search["control"][1])

    @property
    def _joint(self) -> bool:
        return self._search["scope"] == "global"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse groups after construction: which layers compete, and in which order, is settled by then."""
        if hasattr(self, "_search"):
            raise RuntimeError("params must hold every group when the optimizer is made, got one more later")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return groups and momentum as every optimizer does, and under "search" all else a resume needs.

        What passes on groups and momentum alone, as ``get_optimizer_state_dict`` of
        ``torch.distributed.checkpoint`` does, loses the search.
        """
        return {**super().state_dict(), "search": dict(self._search)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a search in its middle, bit for bit, once the model has loaded its own state too.

        Args:
            state_dict: from ``state_dict`` of an optimizer of the same layers, scope and ``total_steps``; its
                schedule, ramp, pairs and seed replace those given to this one.

        Raises:
            ValueError: when it is of another search; nothing has changed then.
        """
        _common_device(self._layers)
        self._require_fitting(state_dict)
        super().load_state_dict(state_dict)
        # Copies, so that the next step leaves the caller's tensors alone.
        for scores in self._scores:
            buffer = self.state[scores]["momentum_buffer"]
            self.state[scores]["momentum_buffer"] = buffer.clone(memory_format=torch.contiguous_format)
        loaded = state_dict["search"].items()
        self._search = {key: v.clone() if isinstance(v, Tensor) else v for key, v in loaded}
        self._bind()

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in ("_model", "_layers", "_search")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # load_state_dict() of the base class comes here too, with nothing but groups and momentum.
        if "_search" in state:
            self._bind()

    def _require_steps_left(self) -> None:
        total_steps = self._search["total_steps"]
        if self._calls >= total_steps:
            # Skipped steps do not count, and only the device knows how many there were.
            self._calls = self.steps
            if self._calls >= total_steps:
                raise RuntimeError(
                    f"step() must be called for total_steps = {total_steps} steps, got one more"
                )

    def _require_same_layers(self) -> list[Tensor]:
        """Return the mask words of the layers, which must be those that the optimizer was made for."""
        for children, key, child, path in self._links:
            if children.get(key) is not child:
                raise RuntimeError(f"module {path!r} must be the one the optimizer was made for, got another")
        scores = [parameters["scores"] for parameters, _ in self._tensors]
        words = self._present_words()
        same = _same(scores, self._scores) and _same(words, self._words)
        if not same or list(map(_version_of, words)) != self._versions:
            self._require_same_scores(scores)
            self._require_num_kept(words)
        return words

    def _require_same_scores(self, scores: list[nn.Parameter]) -> None:
        for name, own, present in zip(self._layers, self._scores, scores, strict=True):
            if present.device != self._device:
                raise RuntimeError(f"layer {name!r} must stay on {self._device}, got {present.device}")
            if present is not own:
                raise RuntimeError(f"scores of {name!r} must be those the optimizer was made for, got others")

    def _require_num_kept(self, words: list[Tensor]) -> None:
        """Check masks that someone else wrote: a resume brings the right counts, a new mask may not."""
        pairs = zip(words, self._scores, strict=True)
        kept = torch.stack([unpack_mask(mask, scores.shape).sum() for mask, scores in pairs])  # [L]
        kept = kept.sum(0, keepdim=True) if self._joint else kept  # [S]
        names = ["the model"] if self._joint else [f"layer {name!r}" for name in self._layers]
        steps = self.steps
        ramp = float(self._search["table"][steps - 1, 1]) if steps else 1.0
        for name, now, (first, last) in zip(
            names, kept.tolist(), self._search["num_kept"].tolist(), strict=True
        ):
            wanted = last + math.ceil((first - last) * ramp)
            if now != wanted:
                raise RuntimeError(
                    f"{name} must keep {wanted} weights at step {steps} of the search, got {now}"
                )

    def _require_fitting(self, state_dict: Mapping[str, Any]) -> None:
        """Check that ``state_dict`` is of this search, and that every number in it can be used safely."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        for key in ("param_groups", "state", "search"):
            if key not in state_dict:
                raise ValueError(f"state_dict must come from SRPopup.state_dict(), got one without {key!r}")
        own, search = self._search, state_dict["search"]
        if not isinstance(search, dict) or search.keys() != own.keys():
            raise ValueError("state_dict must come from SRPopup.state_dict(), got another one")
        for key in ("scope", "total_steps"):
            if search[key] != own[key]:
                raise ValueError(f"state_dict must have {key} {own[key]}, got {search[key]}")
        require_choice("pairs of state_dict", search["pairs"], PAIRS)
        require_seed(search["seed"])
        _require_same_groups(state_dict, self.param_groups)
        for key in ("table", "num_kept", "control"):
            _require_alike(f"{key} of state_dict", search[key], own[key])
        sizes = torch.tensor([scores.numel() for scores in self._scores], device="cpu")
        sizes = sizes.sum(0, keepdim=True) if self._joint else sizes  # [S]
        first, last = search["num_kept"].cpu().unbind(1)
        if not bool(((last >= 1) & (last <= first) & (first <= sizes)).all()):
            raise ValueError(f"num_kept of state_dict must fit the layers, got {search['num_kept'].tolist()}")
        table, steps = search["table"], int(search["control"][0])
        if not 0 <= steps <= own["total_steps"] or not bool(((table >= 0) & (table <= 1)).all()):
            raise ValueError(f"state_dict must hold rates in [0, 1] and a step within them, got step {steps}")

    def _watch(self, words: list[Tensor]) -> None:
        """Remember the masks as they stand, to notice when others write to them."""
        self._words, self._versions = words, list(map(_version_of, words))

    def _step_over(self, words: list[Tensor]) -> SearchStep:
        """Return the step over the layers' present tensors, made anew when one of them was replaced."""
        weights = [parameters["weight"] for parameters, _ in self._tensors]
        effective = [
            self._no_tensor if weight is None else weight
            for weight in (layer.patchable_effective_weight for layer in self._layers.values())
        ]
        step, search = self._step, self._search
        if step is None or not all(
            map(_same, (words, weights, effective), (step.masks, step.weights, step.effective))
        ):
            step = self._step = SearchStep(
                self._scores,
                self._momenta,
                words,
                self._hyper,
                search["num_kept"],
                search["table"],
                search["control"],
                self._stats,
                weights=weights,
                effective=effective,
                joint=self._joint,
                pairs=search["pairs"],
                seed=search["seed"],
                workspace=self._workspace,
            )
        return step

    def _warn_of_missing_gradients(self) -> None:
        """Warn of layers whose weight is read, as some attention does, by a module that never calls them."""
        missing = [name for name, layer in self._layers.items() if layer.scores.grad is None]
        if missing:
            named = ", ".join(map(repr, missing))
            message = f"no gradient has reached {named}; a layer that is read but never called is not masked"
            # The step's caller, past two wrappers of torch's.
            warnings.warn(message, stacklevel=6)

    def _gradients(self) -> list[Tensor]:
        grads = [scores.grad for scores in self._scores]
        return [self._no_tensor if grad is None else grad.contiguous() for grad in grads]

    def _found_inf(self) -> Tensor | None:
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return None
        return torch.as_tensor(found_inf, dtype=torch.float32, device=self._device)

    def _write_hyper(self, scaled: bool = False) -> None:
        """Write the rows that the update reads, unless they stand there already.

        Learning rates and loss scales that are tensors on the GPU are used where they are. Numbers are filled
        in, for a copy from the host's memory would wait for the device. Learning rates stay out of a capture,
        as a replay would read the tensor that was one then; they are written before each replay.

        Args:
            scaled: whether a captured step will write the loss scale itself.
        """
        rows: list[tuple[float, ...]] = []
        tensor_lrs = []
        for i, group in enumerate(self.param_groups):
            lr, momentum, weight_decay, nesterov, step_scale = _hyper_of(group)
            if _stays_on_device(lr):
                if not self._capturing:
                    tensor_lrs.append((i, lr, step_scale))
                lr = -1.0  # no number, not even 0, is what stands there
            try:
                rows.append((float(lr) * step_scale, momentum, weight_decay, float(nesterov), 1.0))
            except (RuntimeError, TypeError, ValueError):
                _require_hyper(group)
                raise
        grad_scale = getattr(self, "grad_scale", None)
        outdated = rows != self._group_rows or (self._scaled and grad_scale is None and not scaled)
        if not (outdated or tensor_lrs or grad_scale is not None):
            return
        if outdated:
            for group, row in zip(self.param_groups, rows, strict=True):
                if row not in self._group_rows:
                    _require_hyper(group if not _stays_on_device(group["lr"]) else {**group, "lr": 0.0})
            self._fill_rows(rows)
            self._group_rows, self._scaled = rows, False
        for i, lr, step_scale in tensor_lrs:
            self._group_hyper[i, 0] = lr.double().squeeze() * step_scale
        if grad_scale is not None:
            self._group_hyper[:, 4] = grad_scale.double().reciprocal()
            self._scaled = True
        torch.index_select(self._group_hyper, 0, self._group_of_layer, out=self._hyper)

    def _fill_rows(self, rows: list[tuple[float, ...]]) -> None:
        for i, row in enumerate(rows):
            before = self._group_rows[i] if self._group_rows else (None,) * len(row)
            for j, value in enumerate(row):
                if value != before[j]:
                    self._group_hyper[i, j].fill_(value)
        if self._scaled:
            self._group_hyper[:, 4].fill_(1.0)


class CapturedSearch(CapturedLayers):
    """A captured step of ``SRPopup``, with all that it finds by its address."""

    def __init__(self, optimizer: SRPopup) -> None:
        self._optimizer = optimizer
        super().__init__(optimizer._model)

    def look(self) -> None:
        """Take what layers and optimizer hold now for what was captured."""
        super().look()
        own = self._optimizer
        # A step in between may be over other effective weights, and replace the one that was captured.
        self._step, self._rows, self._scaled = own._step, (own._hyper, own._group_hyper), own._scaled

    @property
    def is_current(self) -> bool:
        """Whether layers and optimizer hold the same memory now; ``load_state_dict`` gives it another."""
        return self._rows[0] is self._optimizer._hyper and super().is_current

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Do what ``SRPopup.step`` does on the host, around the replay of a captured one.

        Raises:
            RuntimeError: as ``step`` does; nothing has changed then.
        """
        own = self._optimizer
        own._require_steps_left()
        words = own._require_same_layers()
        own._write_hyper(scaled=self._scaled)
        yield
        assert self._step is not None
        self._step.mark_written()
        own._watch(words)
        own._calls += 1
        own._scaled = self._scaled


def _same(present: Sequence[Any], known: Sequence[Any]) -> bool:
    return all(map(operator.is_, present, known))


def _name_of(schedule: str | Schedule) -> str:
    return schedule if isinstance(schedule, str) else getattr(schedule, "__name__", "function")


def _require_ordinary(layers: Mapping[str, MaskedLayer]) -> None:
    for name, layer in layers.items():
        require_whole(f"scores of {name!r}", layer.scores)
        if layer.scores.is_inference():
            raise ValueError(f"scores of {name!r} must be made outside torch.inference_mode, got some of it")


def _name_groups(groups: list[dict[str, Any]], layers: Mapping[str, MaskedLayer]) -> set[str]:
    """Check the groups, write the names of their layers into them, and return all names."""
    name_of = {id(layer.scores): name for name, layer in layers.items()}
    names: set[str] = set()
    for group in groups:
        for scores in group["params"]:
            if id(scores) not in name_of:
                raise ValueError(
                    f"params must be scores of the model's masked layers, got {tuple(scores.shape)}"
                )
            if name_of[id(scores)] in names:
                raise ValueError(f"params must name each scores once, got {name_of[id(scores)]!r} twice")
            names.add(name_of[id(scores)])
        group["param_names"] = [name_of[id(scores)] for scores in group["params"]]
        _require_hyper(group)
    return names


def _stays_on_device(lr: Any) -> bool:
    """Whether a learning rate is a number on the GPU, which is not to be waited for."""
    return isinstance(lr, Tensor) and lr.is_cuda and lr.numel() == 1


def _require_hyper(group: Mapping[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.is_complex():
            raise ValueError(f"lr must be one real number, got {lr.dtype} {list(lr.shape)}")
        lr = float(lr)
    require_number("lr", lr)
    for key in ("momentum", "weight_decay", "step_scale"):
        require_number(key, group[key])
    if not isinstance(group["nesterov"], bool):
        raise TypeError(f"nesterov must be a bool, got {type(group['nesterov']).__name__}")
    if group["nesterov"] and group["momentum"] == 0:
        raise ValueError("momentum must be above 0 for nesterov, got 0")


def _num_kept_rows(
    layers: Mapping[str, MaskedLayer], final_sparsity: float | Mapping[str, int] | None, scope: str
) -> Tensor:
    """Return how many weights each layer keeps at first and in the end.  # [L, 2]"""
    first = {name: layer.num_kept for name, layer in layers.items()}
    for name, count in first.items() if scope == "layer" else [("", sum(first.values()))]:
        if count < 1:
            where = f"layer {name!r}" if name else "the model"
            raise ValueError(f"mask of {where} must keep at least one weight, got none")
    last = dict(first)
    if isinstance(final_sparsity, Mapping):
        last = _given_num_kept(first, final_sparsity)
    elif final_sparsity is not None:
        numel = sum(layer.scores.numel() for layer in layers.values())
        last = scale_budget(first, _final_total(sum(first.values()), len(first), numel, final_sparsity))
    return torch.tensor([(first[name], last[name]) for name in first], dtype=torch.int64)


def _given_num_kept(first: Mapping[str, int], given: Mapping[str, Any]) -> dict[str, int]:
    for name, count in given.items():
        if name not in first:
            raise ValueError(f"final_sparsity must name searched layers, got {name!r}")
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise TypeError(
                f"final_sparsity of {name!r} must be an integer count, got {type(count).__name__}"
            )
        if not 1 <= int(count) <= first[name]:
            raise ValueError(f"final_sparsity of {name!r} must be in [1, {first[name]}] weights, got {count}")
    return {**first, **{name: int(count) for name, count in given.items()}}


def _final_total(kept: int, num_layers: int, numel: int, final_sparsity: Any) -> int:
    if isinstance(final_sparsity, bool) or not isinstance(final_sparsity, Real):
        raise TypeError(
            f"final_sparsity must be a number or a dict of counts, got {type(final_sparsity).__name__}"
        )
    if not 0 <= float(final_sparsity) < 1:
        raise ValueError(f"final_sparsity must be in [0, 1), got {final_sparsity}")
    total = numel - num_pruned(float(final_sparsity), numel)
    if not num_layers <= total <= kept:
        least, most = 1 - kept / numel, 1 - num_layers / numel
        raise ValueError(
            f"final_sparsity must be from the present {least:.6g} to {most:.6g}, got {final_sparsity}"
        )
    return total


def _common_device(layers: Mapping[str, MaskedLayer]) -> torch.device:
    devices = {layer.scores.device for layer in layers.values()}
    if len(devices) != 1:
        raise ValueError(f"scores must be on one device, got {', '.join(sorted(map(str, devices)))}")
    return devices.pop()


def _links(
    model: nn.Module, names: Iterable[str]
) -> list[tuple[dict[str, nn.Module | None], str, nn.Module, str]]:
    """Return every edge from the model down to its layers: (children, key, child, path of the child)."""
    links = {}
    for name in names:
        parent, path = model, ""
        for key in name.split(".") if name else ():
            path = f"{path}.{key}" if path else key
            child = parent.get_submodule(key)
            links[path] = (parent._modules, key, child, path)
            parent = child
    return list(links.values())


def _require_same_groups(state_dict: Mapping[str, Any], own_groups: list[dict[str, Any]]) -> None:
    """Check that groups and momentum of ``state_dict`` are of the same layers in the same order."""
    groups, state = state_dict["param_groups"], state_dict["state"]
    for wanted, got in itertools.zip_longest(_places(own_groups), _places(groups)):
        if wanted != got:
            raise ValueError(f"groups of state_dict must hold (group, layer) {wanted}, got {got}")
    for key in _HYPER:
        if any(key not in group for group in groups):
            raise ValueError(f"groups of state_dict must hold {key}, got one without")
    for group in groups:
        _require_hyper(group)
    indices = [index for group in groups for index in group["params"]]
    scores = [scores for group in own_groups for scores in group["params"]]
    for index, own in zip(indices, scores, strict=True):
        _require_alike(f"momentum_buffer {index}", state.get(index, {}).get("momentum_buffer"), own)


def _require_alike(name: str, value: Any, like: Tensor) -> None:
    def kind(tensor: Tensor) -> str:
        return f"{tensor.dtype} {list(tensor.shape)} {tensor.layout}".removesuffix(" torch.strided")

    got = kind(value) if isinstance(value, Tensor) else type(value).__name__
    wanted = kind(like)
    if got != wanted:
        raise ValueError(f"{name} must be a tensor {wanted}, got {got}")


def _places(groups: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Return each layer with its group, named as before DistributedDataParallel or torch.compile."""
    names = [(i, name) for i, group in enumerate(groups) for name in group.get("param_names", ())]
    return [(i, name.replace("_orig_mod.", "").removeprefix("module.")) for i, name in names]


def _float32_of(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]
