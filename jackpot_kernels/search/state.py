"""Loading a state dict that must fit exactly."""

from collections.abc import Mapping

from torch import Tensor, nn


def load_exactly(name: str, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load ``state`` when it has the names and shapes of the model; otherwise leave the model as it was.

    Args:
        name: what an error calls ``state``.

    Raises:
        ValueError: with the first name or shape that differs.
    """
    wanted = model.state_dict()
    for key in [*wanted, *state]:
        if key not in state or key not in wanted:
            where = "missing" if key in wanted else "besides"
            raise ValueError(f"{name} must have the names of the model's state dict, got {key!r} {where}")
        if state[key].shape != wanted[key].shape:
            shapes = f"{list(wanted[key].shape)}, got {list(state[key].shape)}"
            raise ValueError(f"{name} must have the shapes of the model, {key!r} that of {shapes}")
    model.load_state_dict(state)
