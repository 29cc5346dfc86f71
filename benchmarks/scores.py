"""Scores of single samples: SNIP against forward and backward of the same batches, Wanda against a forward.

    .venv/bin/python -m benchmarks scores

Random Llamas (`sides.py`) of 8 blocks, 8 samples of 128 tokens a batch, SNIP resident and streamed by 4 blocks. Plain is the mean
cross-entropy of the same batches, forward and backward, weights' gradients of the same linears added up as in training; the
naive score runs one sample at a time and adds the absolute gradients that autograd gives. `further batch` is the time of a score of
4 batches less that of 1, by 3: what a score costs that goes on. `whole score` is that of 32 samples from start to end: digests
of the model, the comparison with autograd on the first batch, the trial of the relay, |W|, all of it.

SNIP is compared with the naive score, in fp64 sums; the two modes bit by bit.
"""

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import MOST, Asked, Check, Row, Seconds, apart, compared, timed
from benchmarks.sides import SIZES, Case, base
from deltalab.data.chat import Encoded
from deltalab.deltas.select import scored_linears
from deltalab.safety.scores import snip, wanda

ROUNDS, WARM_UP = 7, 1
SAMPLES, TOKENS, BLOCKS, BATCHES = 8, 128, 8, 4
AT_MOST = {"resident": 1.1, "streamed": 1.5}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""How far scores may be from the naive ones: in bf16 autograd itself is so far from fp32."""


def data(case: Case, batches: int) -> list[Encoded]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, case.vocabulary, (batches * case.sequences, case.tokens), generator=draw).tolist()
    return [Encoded(one, one) for one in ids]


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def plain(model: nn.Module, linears: dict[str, nn.Module], batches: list[Tensor]) -> None:
    for module in linears.values():
        module.get_parameter("weight").requires_grad_(True).grad = None
    for ids in batches:
        loss(model, ids).backward()  # type: ignore[no-untyped-call]
    for module in linears.values():
        module.get_parameter("weight").requires_grad_(False).grad = None


def naive(model: nn.Module, linears: dict[str, nn.Module], ids: Tensor, wide: torch.dtype = torch.float32) -> dict[str, Tensor]:  # fmt: skip
    """1/n Σ |W ⊙ ∇L|, a sample at a time; sums in `wide`."""
    weights = {path: module.get_parameter("weight").requires_grad_(True) for path, module in linears.items()}
    sums = {path: torch.zeros(W.shape, dtype=wide) for path, W in weights.items()}
    for one in ids:
        for (path, W), gradient in zip(weights.items(), torch.autograd.grad(loss(model, one[None]), list(weights.values())), strict=True):  # fmt: skip
            sums[path] += (W.detach().to(wide) * gradient.to(wide)).abs()
    for W in weights.values():
        W.requires_grad_(False)
    return {path: total / len(ids) for path, total in sums.items()}


def naive_norms(model: nn.Module, linears: dict[str, nn.Module], ids: Tensor) -> list[Tensor]:
    """|W| ‖X‖ of a forward of all samples at once, X at the positions whose logits predict something; in fp64."""
    seen: dict[str, Tensor] = {}
    hooks = [m.register_forward_pre_hook(lambda _, args, path=path: seen.__setitem__(path, args[0])) for path, m in linears.items()]  # fmt: skip
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [m.get_parameter("weight").double().abs() * seen[path][:, :-1].double().flatten(0, 1).norm(dim=0) for path, m in linears.items()]  # fmt: skip


def rows(asked: Asked) -> Iterator[Row]:
    cases = [Case(size, dtype, layers=BLOCKS, sequences=SAMPLES, tokens=TOKENS)
             for dtype in (torch.float32, torch.bfloat16) for size in ("S", "L")]  # fmt: skip
    if asked.quick:
        cases = [Case("S", torch.float32, layers=2, sequences=2, tokens=32, vocabulary=256)]
    for case in cases:
        setting = f"hidden {SIZES[case.size]}, {str(case.dtype)[6:].replace('bfloat16', 'bf16').replace('float32', 'fp32')}, {case.layers} blocks, {case.sequences} × {case.tokens} tokens"  # fmt: skip
        if asked.wants("SNIP", setting):
            yield from snips(case, setting, asked)
        if asked.wants("Wanda", setting):
            yield from wandas(case, setting, asked)


def snips(case: Case, setting: str, asked: Asked) -> Iterator[Row]:
    model, linears, few, many, batches = prepared(case)
    streamed: dict[str, Any] = {"mode": "streamed", "blocks": case.layers // 2}
    want, one, two = naive(model, linears, batches[0], torch.float64), snip(model, few), snip(model, few, **streamed)
    checks = {
        "resident": [Check("from the naive score", apart([one[p] for p in want], want.values()), BOUNDS[case.dtype])],
        "streamed": [Check("from resident", apart([two[p] for p in want], [one[p] for p in want]), 0.0)],
    }
    del want, one, two
    seconds = timed({
        "plain": lambda: plain(model, linears, batches[1:]),
        "naive": lambda: naive(model, linears, batches[0]),
        "resident 1": lambda: snip(model, few),
        "resident": lambda: snip(model, many),
        "streamed 1": lambda: snip(model, few, **streamed),
        "streamed": lambda: snip(model, many, **streamed),
    }, asked.turns(ROUNDS), WARM_UP)  # fmt: skip
    a_batch = {"plain": each(seconds["plain"]), "naive": seconds["naive"]}
    for mode, most in AT_MOST.items():
        further = a_batch | {mode: further_batch(seconds, mode)}
        yield compared(f"SNIP {mode}, further batch", setting, further, mode, "plain", target=most, direction=MOST, checks=checks[mode])  # fmt: skip
        whole = {"plain": a_batch["plain"], mode: [t / BATCHES for t in seconds[mode]]}
        yield compared(f"SNIP {mode}, whole score, by batch", setting, whole, mode, "plain", direction=MOST, checks=checks[mode])  # fmt: skip


def wandas(case: Case, setting: str, asked: Asked) -> Iterator[Row]:
    model, linears, few, many, batches = prepared(case)
    got, want = wanda(model, few), naive_norms(model, linears, batches[0])
    checks = [Check("from one forward's norms", apart([got[path] for path in linears], want), BOUNDS[case.dtype] / 10)]
    del got, want

    @torch.no_grad()
    def forward() -> None:
        for ids in batches[1:]:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    seconds = timed(
        {"forward": forward, "wanda 1": lambda: wanda(model, few), "wanda": lambda: wanda(model, many)},
        asked.turns(ROUNDS), WARM_UP,
    )  # fmt: skip
    further = {"forward": each(seconds["forward"]), "wanda": further_batch(seconds, "wanda")}
    yield compared("Wanda, further batch", setting, further, "wanda", "forward", direction=MOST, checks=checks)


def prepared(case: Case) -> tuple[transformers.PreTrainedModel, dict[str, nn.Module], list[Encoded], list[Encoded], list[Tensor]]:  # fmt: skip
    """The model, its linears, the samples of the first batch, those of all, and the batches as tensors."""
    model, many = base(case).eval(), data(case, BATCHES)
    ids = torch.tensor([sample.input_ids for sample in many])
    return model, scored_linears(model), many[: case.sequences], many, list(ids.split(case.sequences))


def each(seconds: list[float]) -> list[float]:
    return [t / (BATCHES - 1) for t in seconds]


def further_batch(seconds: Seconds, side: str) -> list[float]:
    return each([four - one for four, one in zip(seconds[side], seconds[f"{side} 1"], strict=True)])
