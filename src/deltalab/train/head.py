"""The loss from what a model's output layer is given, without the logits of all rows.

The model's own forward runs as always, through whatever is wrapped round it (autocast, data parallelism); only that for
one call its output layer is given no rows, and the rows that it would have been given go to the cross-entropy of
`deltalab.kernels`, with the layer's weight. So it does not matter how a model comes to these rows. What it does with its
logits afterwards is a scale and a soft cap of the config, or nothing: in the first call the layer gives out numbers
that are known, and the model's logits have to be one of these formulas of them. Where they are not, or something looks
on (hooks) or acts on the layer (a delta, codes), the loss is that of the model's own logits.
"""

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from deltalab.core.shapes import Float, Int
from deltalab.data.chat import IGNORED
from deltalab.data.packing import Batch
from deltalab.deltas.weights import adaptation, is_adapted
from deltalab.kernels.cross_entropy import linear_cross_entropy
from deltalab.train import rng

NUMBERS = ("logit", "multiplier", "softcap", "soft_cap")
"""Parts of the names under which configs keep scales and soft caps of logits, among others that fit nothing."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class After(NamedTuple):
    """z = cap · tanh(s u / cap), or s u: the logits of what the output layer gives."""

    scale: float = 1.0
    softcap: float | None = None

    def of(self, u: Tensor) -> Tensor:
        u = u * self.scale
        return u if self.softcap is None else self.softcap * torch.tanh(u / self.softcap)


@dataclass
class Route:
    """A model's output layer and what comes after it. numbers: of the config, that it may be made of.

    above: the modules that logits pass on their way out, but for the model itself; after: None until it was tried; never:
    why the loss cannot be made here, if that was found by trying.
    """

    head: nn.Linear
    name: str
    numbers: list[float]
    above: list[nn.Module]
    after: After | None = None
    never: str = ""


ROUTES: "weakref.WeakKeyDictionary[nn.Module, Route]" = weakref.WeakKeyDictionary()


def nll_of_head(model: nn.Module, batch: Batch) -> Float[Tensor, ""] | None:
    """−Σ log p over the counted tokens, in fp32 or wider; None where the model's own logits have to be asked.

    It is the result of the call of `model`, so that a wrapper sees what the loss depends on.
    """
    if why_not(model):
        return None
    below = inner(model)
    route = ROUTES[below]
    call = Call(route, batch["labels"])
    state = rng.capture() if route.after is None else None
    arguments = {name: value for name, value in batch.items() if name != "labels"}
    out: Any = None
    with call.listening(below):
        try:
            out = model(**arguments, use_cache=False)
        except Exception as error:  # whatever a forward raises that cannot do with what it got
            if state is None:
                raise
            call.failed = f"its forward asks more of its logits ({type(error).__name__}: {error})"
    if not call.failed:
        return out  # type: ignore[no-any-return]
    route.never = call.failed
    if state is not None:
        rng.restore(*state)  # the pass is made again, and draws what this one drew
    return None


def told(model: nn.Module) -> str:
    """Where the loss of a model is computed, and why there; for records."""
    why = why_not(model)
    if why:
        return f"of the model's logits: {why}"
    route = ROUTES[inner(model)]
    after = route.after or After()
    scale = f", times {after.scale:g}" if after.scale != 1 else ""
    cap = f", capped at {after.softcap:g}" if after.softcap is not None else ""
    return f"cross-entropy over {route.name} in chunks of the counted rows{scale}{cap}"


def inner(model: nn.Module) -> nn.Module:
    """The model under torch's data parallelism."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def why_not(model: nn.Module) -> str:
    """What keeps the loss from being made of the output layer's input now; nothing if nothing is known to."""
    below = inner(model)
    if not isinstance(below, PreTrainedModel):
        return f"{type(below).__name__} is not a model of transformers itself"
    if is_adapted(below) and adaptation(below).kernels == "plain":
        return "kernels='plain'"
    if below._compiled_call_impl is not None or torch.compiler.is_compiling():
        return "it is compiled"
    head = below.get_output_embeddings()
    if type(head) is not nn.Linear:
        return "it names no output layer" if head is None else f"its output layer is of class {type(head).__name__}"
    if "forward" in head.__dict__ or any(type(p) is not nn.Parameter for p in head.parameters()):
        return "its output layer is spread over devices"
    numbers = [float(v) for k, v in vars(below.config.get_text_config(decoder=True)).items()
               if any(part in k for part in NUMBERS) and isinstance(v, (int, float)) and v > 0]  # fmt: skip
    route = ROUTES.get(below)
    if route is None or route.head is not head or route.numbers != numbers:
        name, above = _path(below, head)
        route = ROUTES[below] = Route(head, name, numbers, above)
    if any(getattr(module, hooks) for module in (model, below, *route.above) for hooks in HOOKS):
        return "hooks look at its logits"
    return route.never


class Call:
    """One call of a model with its output layer listened to. failed: why there is no loss, as long as there is none."""

    def __init__(self, route: Route, labels: Int[Tensor, "batch seq"]) -> None:
        self.route, self.targets = route, F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        self.failed = "its output layer is not asked once, with a row for each token"
        self.hidden: list[Tensor] = []
        self.given: Tensor | None = None

    @contextlib.contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Nothing is left behind."""
        head = self.route.head
        handles = [head.register_forward_pre_hook(self._take), model.register_forward_hook(self._answer)]
        if self.route.after is None:
            handles.append(head.register_forward_hook(self._give))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        """Keep the rows; the output layer goes on with none, or with the first of each sample to be told what to give."""
        x: Tensor = args[0]
        self.hidden.append(x)
        if x.shape[:-1] != self.targets.shape:
            return None
        device = x.device.type
        self.autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return (x[:, : int(self.route.after is None)],)

    def _give(self, head: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Known numbers in place of products, from small to large."""
        self.given = (4 * torch.linspace(-5, 5, out.shape[-1]).sinh()).to(out).expand_as(out)
        return self.given.clone()

    def _answer(self, model: nn.Module, args: Any, out: Any) -> Tensor | None:
        """The loss in place of the model's output."""
        if len(self.hidden) != 1 or self.hidden[0].shape[:-1] != self.targets.shape:
            return None
        if self.given is not None:
            self.route.after = after(self.given, out.logits, self.route.numbers)
        if self.route.after is None:
            self.failed = "its logits are not those of its output layer, scaled and capped by numbers of its config"
            return None
        (x,), head = self.hidden, self.route.head
        scale, cap = self.route.after
        self.failed = ""
        with self.autocast:
            return linear_cross_entropy(
                x.flatten(0, -2), head.weight, self.targets.flatten().to(x.device), head.bias, softcap=cap, scale=scale
            )


def after(given: Tensor, logits: Tensor, numbers: Sequence[float]) -> After | None:
    """The formula, with numbers of the config, that makes `logits` of what the output layer gave; None if none does."""
    if given.shape != logits.shape:
        return None
    rounding = max(torch.finfo(t.dtype).eps for t in (given, logits))
    u, z = given.detach().double(), logits.detach().double()
    scales = [1.0, *itertools.chain.from_iterable((n, 1 / n) for n in numbers)]
    formulas = [After(scale, cap) for cap in (None, *numbers) for scale in scales]
    errors = [float(((f.of(u) - z).abs() / (z.abs() + 1e-3)).max()) for f in formulas]
    least = min(errors)
    return formulas[errors.index(least)] if least <= max(2 * rounding, 1e-5) else None


def _path(model: nn.Module, head: nn.Module) -> tuple[str, list[nn.Module]]:
    """The name of a module of the model, and the modules that it is within, itself included."""
    name = next(name for name, module in model.named_modules() if module is head)
    parts = name.split(".")
    return name, [model.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts))]
