"""Scores from their definitions: one sample at a time, without padding, sums written out. And data to score on."""

from dataclasses import dataclass

import torch

from deltalab.deltas.base import weight_of
from deltalab.deltas.select import scored_linears
from tests.helpers import tokens


@dataclass(frozen=True)
class Sample:
    input_ids: list
    labels: list


def samples(n=5, vocab=270, seed=0, length=14):
    """Random conversations of one length: a prompt of random length, then a reply."""
    out = []
    for i in range(n):
        ids = tokens(1, length, vocab, seed + i)[0].tolist()
        start = 3 + (7 * i) % (length - 6)
        out.append(Sample(ids, [-100] * start + ids[start:]))
    return out


def ragged(n=7, vocab=270, seed=0):
    """Random conversations of different lengths, some with two replies, one without any."""
    out = []
    for i in range(n):
        length = 8 + (5 * i) % 13
        ids = tokens(1, length, vocab, seed + i)[0].tolist()
        labels = [-100] * 3 + ids[3:6] + [-100] + ids[7:]
        out.append(Sample(ids, [-100] * length if i == 2 else labels))
    return out


def loss_positions(sample, positions):
    """Where SNIP's loss is counted, token by token."""
    found = []
    for t in range(len(sample.input_ids) - 1):
        if sample.labels[t + 1] != -100 and (positions != "response" or sample.labels[t] != -100):
            found.append(t)
    return found[: int(positions[6:])] if positions.startswith("first-") else found


def input_positions(sample, positions):
    """Where Wanda takes its inputs, token by token."""
    if positions == "response":
        return [t for t, label in enumerate(sample.labels) if label != -100]
    return loss_positions(sample, positions)


def nll(model, sample, positions="predicting"):
    """Mean −log p over the counted positions, None without any."""
    where = loss_positions(sample, positions)
    if not where:
        return None
    logits = model(torch.tensor([sample.input_ids])).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.stack([-torch.log_softmax(logits[t], -1)[sample.input_ids[t + 1]] for t in where]).mean()


def magnitudes(model, base=None, modules=None):
    """|W| or |W − W_base|, (out, in), fp64."""
    modules = scored_linears(model) if modules is None else modules
    found = {path: weight_of(m).detach().double() for path, m in modules.items()}
    return {
        path: (W if base is None else W - weight_of(base.get_submodule(path)).detach().double()).abs()
        for path, W in found.items()
    }


def brute_snip(model, data, positions="predicting", base=None, modules=None, after=False):
    """Mean over samples of |W ⊙ ∇L| from autograd.grad of each sample's own loss. after: absolute value after the mean."""
    modules = scored_linears(model) if modules is None else modules
    wide = magnitudes(model, base, modules)
    total = {path: torch.zeros_like(W) for path, W in wide.items()}
    was = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(True)
    n = 0
    for sample in data:
        loss = nll(model, sample, positions)
        if loss is None:
            continue
        n += 1
        grads = torch.autograd.grad(loss, [m.weight for m in modules.values()])
        for (path, module), grad in zip(modules.items(), grads, strict=True):
            grad = (
                grad.T if weight_of(module).shape != module.weight.shape or type(module).__name__ == "Conv1D" else grad
            )
            term = wide[path] * grad.double()
            total[path] += term if after else term.abs()
    for parameter, required in zip(model.parameters(), was, strict=True):
        parameter.requires_grad_(required)
    return {path: (value / n).abs() for path, value in total.items()}


def inputs_of(model, sample, modules):
    """Path and input (tokens, in) of every call of a module, the sample alone in the model."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda _module, args, _output, path=path: seen.append((path, args[0])))
        for path, module in modules.items()
    ]
    with torch.no_grad():
        model(torch.tensor([sample.input_ids]))
    for hook in hooks:
        hook.remove()
    return [(path, x.reshape(len(sample.input_ids), -1)) for path, x in seen]


def brute_wanda(model, data, positions="predicting", base=None, modules=None):
    """|W_ij| · √Σ x_j², the sum over counted positions one at a time, each sample alone in the model."""
    modules = scored_linears(model) if modules is None else modules
    squares = {path: torch.zeros(weight_of(m).shape[1], dtype=torch.float64) for path, m in modules.items()}
    for sample in data:
        for path, x in inputs_of(model, sample, modules):
            for t in input_positions(sample, positions):
                squares[path] += x[t].double() ** 2
    return {path: W * squares[path].sqrt() for path, W in magnitudes(model, base, modules).items()}


BRUTE = {"snip": brute_snip, "wanda": brute_wanda}


def largest(got, want):
    """The largest error over all matrices, relative to each matrix's largest score."""
    assert list(got) == list(want)
    return max(float((got[p].double() - want[p].double()).abs().max() / want[p].double().max()) for p in want)
