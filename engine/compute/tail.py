"""What a model does to its logits before it gives them (scales, soft caps), learned by watching it
once, so that it can be done to tiles of them. Knows no rows.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Self

import torch
from greenlet import greenlet
from torch import nn
from transformers.utils import ModelOutput

from engine.errors import UnsupportedModelError
from engine.memory.layout import decoder_of

_ELEMENTWISE: Final = frozenset(
    {"__mul__", "__rmul__", "__truediv__", "mul", "mul_", "div", "div_", "true_divide"}
    | {"tanh", "tanh_", "clamp", "clamp_", "float", "to", "type", "contiguous", "clone"}
)
"""Functions that make of each logit another one, whatever the others are."""


class _Step(NamedTuple):
    """One call; `before` and `after` are its arguments around the logits."""

    function: Callable[..., torch.Tensor]
    before: Sequence[Any]
    after: Sequence[Any]
    options: Mapping[str, Any]


class Tail:
    """Called with float32 (rows, some of the vocabulary), gives what the model would give there."""

    def __init__(self, steps: Sequence[_Step]) -> None:
        self._steps = tuple(steps)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        for step in self._steps:
            logits = step.function(*step.before, logits, *step.after, **step.options)
        return logits.float()


class _Watched(torch.Tensor):
    """Logits that remember what is done to them. Raises UnsupportedModelError where that is not done
    to each of them by itself.
    """

    steps: tuple[_Step, ...] = ()

    @classmethod
    def of(cls, logits: torch.Tensor) -> Self:
        return logits.as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        found = super().__torch_function__(func, types, args, options)  # type: ignore[no-untyped-call]
        if found is not None and not isinstance(found, torch.Tensor):
            return found  # a size, a device: nothing was done
        name = getattr(func, "__name__", str(func))
        places = [index for index, each in enumerate(args) if isinstance(each, cls)]
        at = places[0] if places else 0
        others = [*args[:at], *args[at + 1 :], *options.values()]
        if name not in _ELEMENTWISE or not places or not all(map(_is_scalar, others)):
            raise UnsupportedModelError(f"its logits go through {name}, not each by itself")
        step = _Step(func, args[:at], args[at + 1 :], options)
        watched: Any = found
        watched.steps = (*args[at].steps, step)
        return watched


@dataclasses.dataclass
class _Decoded(ModelOutput):  # type: ignore[misc]  # it is untyped
    """What a decoder that was not run answers: last hidden states, and None for all the rest."""

    last_hidden_state: torch.Tensor

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def watch_tail(model: Any, *, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tail:
    """Runs the model's forward around its decoder, which is not run, and its head, which is gated.

    Raises UnsupportedModelError if what is done to logits cannot be followed.
    """
    decoder: Any = decoder_of(model)
    states = torch.zeros(1, 1, hidden_size, dtype=dtype, device=device)
    decoder.forward = lambda *_, **__: _Decoded(last_hidden_state=states)
    try:
        with torch.inference_mode():
            return Tail(_steps_of(model, device))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"its head cannot be run alone: {error!r}") from error
    finally:
        del decoder.forward


def _steps_of(model: nn.Module, device: torch.device) -> Sequence[_Step]:
    at_zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    forward = greenlet(
        lambda: model(
            input_ids=at_zero, position_ids=at_zero, use_cache=False, logits_to_keep=at_zero[0]
        )
    )
    forward.hidden = None  # the layers' gates would look for it
    if not isinstance(forward.switch(), torch.Tensor):
        forward.throw()
        raise UnsupportedModelError("its layers run elsewhere than in its decoder")
    logits = forward.switch(_Watched.of(torch.zeros(1, 0, 1, device=device))).logits
    if not isinstance(logits, _Watched):
        raise UnsupportedModelError("its logits are not those of its head")
    return logits.steps


def _is_scalar(value: object) -> bool:
    """Watched logits are none: they have no values."""
    return not isinstance(value, torch.Tensor) or value.numel() == 1
