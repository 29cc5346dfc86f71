"""What merging costs: a merged model against the adapted one that it came from.

Of the logits z of the adapted model and z' of the merged one, over the tokens that the attention mask shows:

    error       ‖z' − z‖ / ‖z‖ of all of them together; and of each token, the mean and the worst
    KL          mean Σ_v p_v (log p_v − log p'_v), nats a token, p = softmax z
    agreement   share of the tokens at which both find the same next token likeliest

Of each merged weight, W' as it should be and Ŵ' as the merged model has it: ‖Ŵ' − W'‖ / ‖W'‖, and the same as a part of the
change that was merged, ‖Ŵ' − W'‖ / ‖ΔW‖. An error of 1 in the second is a change that might as well not have been made.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.capture import undisturbed
from deltalab.core.errors import UserError
from deltalab.core.shapes import Float
from deltalab.deltas.base import wide
from deltalab.deltas.weights import attached, delta_weight, is_adapted, merged_weight

Batches = Sequence[Mapping[str, Tensor]]
Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Gap:
    """How far one model's logits are from another's. largest: of all single differences. tokens: that were compared."""

    error: float
    mean: float
    worst: float
    kl: float
    agreement: float
    tokens: int
    largest: float


@dataclass(frozen=True)
class MatrixError:
    """‖Ŵ' − W'‖ over ‖W'‖, and over ‖ΔW‖; the second None where nothing changed."""

    of_weight: float
    of_change: float | None


@dataclass(frozen=True)
class MergePrice:
    """The price of a merged model. matrices: by path. bytes, metric: of the adapted model and of the merged one."""

    logits: Gap
    matrices: dict[str, MatrixError]
    bytes: tuple[int, int]
    metric: tuple[float, float] | None = None

    def plain(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        gap, mib = self.logits, [count / 2**20 for count in self.bytes]
        rows = [
            ("logits", f"relative error {gap.error:.2e}; by token {gap.mean:.2e}, the worst {gap.worst:.2e}"),
            ("KL", f"{gap.kl:.2e} nats a token, over {gap.tokens:,} tokens"),
            ("likeliest", f"the same next token at {100 * gap.agreement:.2f} %"),
            ("weights", self._weights()),
            ("bytes", f"{mib[0]:,.1f} → {mib[1]:,.1f} MiB"),
        ]
        if self.metric is not None:
            rows.append(("metric", f"{self.metric[0]:.4g} → {self.metric[1]:.4g}"))
        return "\n".join(f"  {name:<10} {text}" for name, text in rows)

    def _weights(self) -> str:
        if not self.matrices:
            return "none was merged"
        worst = max(self.matrices, key=lambda path: self.matrices[path].of_weight)
        mean = sum(matrix.of_weight for matrix in self.matrices.values()) / len(self.matrices)
        changes = [matrix.of_change for matrix in self.matrices.values() if matrix.of_change is not None]
        part = f"; {sum(changes) / len(changes):.2e} of their changes" if changes else ""
        return f"{len(self.matrices)} merged, relative error {mean:.2e}, the worst {self.matrices[worst].of_weight:.2e} ({worst}){part}"


def merge_price(model: nn.Module, merged: nn.Module, batches: Batches, metric: Metric | None = None) -> MergePrice:
    """What `merged`, made of the adapted `model`, costs; both are left as they are.

    batches: inputs of the models. metric: a figure of a model, taken of both.
    Raises: UserError if `model` has no adapter, or there is no token to compare.
    """
    if not is_adapted(model):
        raise UserError("the price of merging is against the adapted model, and this one has no adapter.",
                        next="deltalab.merge_price(adapted, deltalab.merged(adapted), batches)")  # fmt: skip
    gap = logits_gap(model, merged, batches)
    matrices = {path: matrix_error(model, merged, path) for path in attached(model)}
    figures = None if metric is None else (float(metric(model)), float(metric(merged)))
    return MergePrice(gap, matrices, (model_bytes(model), model_bytes(merged)), figures)


def matrix_error(model: nn.Module, merged: nn.Module, path: str) -> MatrixError:
    """Of one weight; what is left as an adapter of `merged` counts as a part of its weight."""
    want, change = merged_weight(model, path), delta_weight(model, path).norm()
    lost = (merged_weight(merged, path).to(want.dtype) - want).norm()
    return MatrixError(float(lost / want.norm()), float(lost / change) if change else None)


def logits_gap(model: nn.Module, other: nn.Module, batches: Batches) -> Gap:
    """How far the logits of `other` are from those of `model`, in eval mode.

    Raises: UserError if there is no token to compare.
    """
    squares = torch.zeros(2, dtype=torch.float64)  # ‖z' − z‖², ‖z‖²
    errors, kl, same, largest = [], 0.0, 0, 0.0
    for batch in batches:
        z, y = (_logits(one, batch) for one in (model, other))
        off, size = (y - z).norm(dim=-1).double(), z.norm(dim=-1).double()
        largest = max(largest, float((y - z).abs().max())) if z.numel() else largest
        squares += torch.stack([off.square().sum(), size.square().sum()]).cpu()
        errors += (off / size).tolist()
        log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
        same += int((z.argmax(-1) == y.argmax(-1)).sum())
    n = len(errors)
    if not n:
        raise UserError("there is no token to compare the models on.", next="give batches with tokens in them")
    return Gap(math.sqrt(squares[0] / squares[1]), sum(errors) / n, max(errors), max(kl, 0.0) / n, same / n, n, largest)


def mean_loss(batches: Batches) -> Metric:
    """The metric that is the mean loss of the labelled tokens of `batches`."""

    def of(model: nn.Module) -> float:
        total = count = 0.0
        for batch in batches:
            labelled = int((batch["labels"][..., 1:] != -100).sum())
            total += labelled * float(_run(model, batch).loss)
            count += labelled
        return total / count

    return of


def model_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of a model, deltas included, tied ones once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "tokens vocab"]:
    """Of the tokens that count, in fp32 or wider."""
    logits: Tensor = _run(model, {key: value for key, value in batch.items() if key != "labels"}).logits
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == logits.shape[:-1]:
        logits = logits[mask.bool().to(logits.device)]
    return logits.reshape(-1, logits.shape[-1]).to(wide(logits.dtype))


def _run(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    device = next(model.parameters()).device
    with undisturbed(model), torch.no_grad():
        return model(**{key: value.to(device) for key, value in batch.items()})
