"""Injects known faults into a copy of the package, one at a time; the tests named beside each must turn red.

    .venv/bin/python tools/mutants.py [NAME ...] [--list]

A fault is a replacement of a string that stands exactly once in its file; where it does not, the list here is out of
date and the run fails. The tests must be green without a fault, and a fault must fail a test rather than an import.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
GREEN, RED, HANGS = 0, 1, 124  # pytest's exit codes, and ours; others than the first two are no verdict
LIMIT = 1800
"""Seconds after which tests that do not end are stopped."""


class Mutant(NamedTuple):
    """A fault. changes: (file under src/deltalab, what stands there once, what is put in its place)."""

    name: str
    changes: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


def mutant(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """A fault of one replacement."""
    return Mutant(name, ((file, old, new),), tests)


MUTANTS = [
    mutant(
        "losses of two tasks are compared", "lab/compare.py", "if own & part[1] or not own | part[1]", "if True",
        "tests/lab/test_compare.py",
    ),
    mutant(
        "settings called alike are one group", "lab/spec.py", 'f"{name} ({told})" if told else name', "name",
        "tests/lab/test_spec.py",
    ),
    mutant(
        "a choice by the least", "lab/tuning.py", "(sign * value, -held_out)", "(-sign * value, -held_out)",
        "tests/lab/test_tuning.py",
    ),
    mutant(
        "a choice before all have ended", "lab/tuning.py", "if group not in open_", "if True", "tests/lab/test_tuning.py",
    ),
    mutant(
        "what is tuned runs on test data", "lab/spec.py", '"validation": spec.tune.validation, "costs"', '"costs"',
        "tests/lab/test_tuning.py",
    ),
    mutant(
        "repeated samples on both sides of validation", "train/parts.py",
        'c.meta.get("same") or repr(c.messages) for c in train', "str(i) for i, c in enumerate(train)", "tests/train/test_costs.py",
    ),
    mutant(
        "gradients in the base are not seen", "train/costs.py", "with_one <= trained", "bool(trained)", "tests/train/test_costs.py",
    ),
    mutant(
        "another adapter passes for the one trained", "train/costs.py", "off <= 4 * ROUNDINGS", "off <= 1e9 * ROUNDINGS",
        "tests/train/test_costs.py",
    ),
    mutant(
        "a bad merge passes", "train/costs.py", '"holds": gap.error <= allowed', '"holds": allowed > 0', "tests/train/test_costs.py",
    ),
    mutant(
        "a touched base passes", "train/run.py", "model_digest(model) == base, **proofs", "bool(base), **proofs",
        "tests/train/test_costs.py",
    ),
    mutant(
        "shards part a group", "lab/trials.py", "if sweep.tuning:\n", "if False:\n", "tests/lab/test_tuning.py",
    ),
    mutant(
        "defaults are part of a trial's id", "lab/spec.py", "digest(run.told())", "digest(run.plain())", "tests/lab/test_trials.py",
    ),
    mutant(
        "a share below the baseline is shown by its mean", "lab/compare.py", '"shown" if worst > bound', '"shown" if best > bound',
        "tests/lab/test_compare.py",
    ),
    mutant(
        "examples of other seeds are paired", "lab/compare.py", "seeds = [seed for seed in ours if seed in theirs]", "seeds = list(ours)",
        "tests/lab/test_compare.py",
    ),
    mutant(
        "p-values of a table one by one", "lab/compare.py", "holm([d.p for d in tested if d is not None]).tolist()",
        "[d.p for d in tested if d is not None]", "tests/lab/test_compare.py",
    ),
    mutant(
        "a front keeps what is beaten", "lab/compare.py", "all(a <= b for a, b in zip(other, point, strict=True))",
        "all(a < b for a, b in zip(other, point, strict=True))", "tests/lab/test_compare.py",
    ),
    mutant(
        "a search draws what is on its way", "lab/search.py", "if trial is not None and trial.id in taken:", "if False:",
        "tests/lab/test_on_ray.py",
    ),
    mutant(
        "no trial of a search is watched on Ray", "lab/on_ray.py", "return run_one(sweep, trial, watch=watch)", "return run_one(sweep, trial)",
        "tests/lab/test_on_ray.py",
    ),
    mutant(
        "a new head is looked into", "measure/inside.py", "in start.keys() - set(but)}", "in start.keys()}", "tests/models/test_head_for.py",
    ),
    mutant(
        "an expert without its scale", "deltas/lora_experts.py", "self.B[..., e, :], self.s) for e", "self.B[..., e, :], 1.0) for e",
        "tests/measure/test_inside.py",
    ),
    mutant(
        "oneDNN keeps every kernel", "models/load.py", "    keep_few_kernels()\n", "", "tests/models/test_kernels_kept.py",
    ),
    mutant(
        "a score is searched for its least", "lab/search.py", "directions.MINIMIZE if self.sign > 0 else directions.MAXIMIZE", "directions.MINIMIZE",
        "tests/lab/test_search.py",
    ),
    mutant(
        "trackers get a step twice", "train/tracking.py", "if self.step > has:", "if True:", "tests/train/test_tracking.py",
    ),
    mutant(
        "freed memory is kept", "core/memory.py", "ctypes.CDLL(None).malloc_trim(0)", "pass", "tests/core/test_memory.py"
    ),
    mutant(
        "tensors in a file by name alone", "core/tensors.py",
        "(-ORDER[names[key]], key.encode())", "key.encode()", "tests/core/test_tensors.py",
    ),
    mutant(
        "an MLP is tried with weights of zero", "deltas/fuse.py",
        "0.3 * _probe(shape, like) * (1 + i)", "0 * _probe(shape, like) * (1 + i)", "tests/deltas/test_fuse.py",
    ),
    mutant(
        "packed samples go by their length", "train/loop.py", "not self.packing.packed\n", "True\n",
        "tests/train/test_packing.py", "tests/train/test_loop.py",
    ),
    mutant(
        "short rows of fp32 go through our attention", "kernels/attention.py",
        "return least <= tokens <= most", "return tokens <= most", "tests/kernels/test_attention.py",
    ),
    mutant(
        "attention past a segment's beginning", "kernels/attention_blocks.py",
        "return [slice(stop - length, stop) for stop",
        "return [slice(0, stop) for stop",
        "tests/kernels/test_attention_blocks.py",
    ),
    mutant(
        "scores of attention in 16 bit", "kernels/attention_blocks.py",
        "wide = torch.promote_types(dtype, torch.float32)\n",
        "wide = dtype\n",
        "tests/kernels/test_attention_blocks.py",
    ),
    mutant(
        "a key's gradient without the scale", "kernels/attention_blocks.py",
        "sums[0].add(to, (dS.mT @ asked).mul_(scale))",
        "sums[0].add(to, dS.mT @ asked)",
        "tests/kernels/test_attention_blocks.py",
    ),
    mutant(
        "our attention outside of training", "kernels/attention.py",
        "if not module.training or torch.compiler.is_compiling():",
        "if torch.compiler.is_compiling():",
        "tests/kernels/test_attention.py",
    ),
    mutant(
        "our attention stays when it is removed", "kernels/attention.py",
        "config._attn_implementation_internal = before[name]",
        "pass",
        "tests/kernels/test_attention_install.py",
    ),
    mutant(
        "padding seen by attention", "kernels/attention_masks.py",
        "return Pattern(None, keys, None)",
        "return Pattern(None, None, None)",
        "tests/kernels/test_attention.py",
    ),
    mutant("a bank keeps stacks at once", "deltas/stacks.py", "if key not in self._asked:", "if False:", "tests/models/test_bank_stacks.py"),
    mutant("a bank's stacks are those of another path", "deltas/bank.py", "kept.get((self.path, group.key,", "kept.get((group.key,", "tests/models/test_bank_stacks.py"),
    mutant("stacks of a removed adapter stay", "models/bank.py", "for them in [them for them in self._sets if gone in them]:", "for them in []:", "tests/models/test_bank_stacks.py"),
    mutant("rows of a bank go back in another order", "deltas/stacks.py", "y += change.index_select(0, where.back)", "y += change", "tests/models/test_bank_stacks.py"),
    mutant("strips where a gradient is asked for", "quant/strips.py", "not torch.is_grad_enabled() and x.device", "x.device", "tests/quant/test_strips.py"),
    mutant("every strip gets the first rows' bias", "quant/strips.py", "bias[done : done + len(W)]", "bias[: len(W)]", "tests/quant/test_strips.py"),
    mutant("the middle of codes not given back", "quant/groups.py", "F.linear(sums, low + middle * scales)", "F.linear(sums, low)", "tests/quant/test_strips.py"),
    mutant("a prompt's keys outlive an edit in place", "deltas/prompt_keys.py", "return id(tensor), tensor._version, storage,", "return id(tensor), storage,", "tests/deltas/test_prompt_keys.py"),
    mutant("a prompt's keys outlive another tensor's memory", "deltas/prompt_keys.py", "tensor._version, storage, tensor.storage_offset()", "tensor._version, tensor.storage_offset()", "tests/deltas/test_prompt_keys.py"),
    mutant("a prompt's keys are kept in training", "deltas/prompt_keys.py", "None if torch.is_grad_enabled() else _parts(attention, prompt)", "_parts(attention, prompt)", "tests/deltas/test_prompt_keys.py"),
    mutant("a prompt's keys outlive a hook", "deltas/prompt_keys.py", "bool(module._forward_hooks or module._forward_pre_hooks)", "False", "tests/deltas/test_prompt_keys.py"),
    mutant("a prompt's keys outlive a setting", "deltas/prompt_keys.py", "return id(module), type(module), plain", "return id(module), type(module)", "tests/deltas/test_prompt_keys.py"),
    mutant(
        "a packed sample predicts the next one's first token", "data/packing.py",
        "    labels[ends[:-1]] = IGNORED\n",
        "",
        "tests/train/test_packing.py",
    ),
    mutant(
        "positions run on through a packed row", "data/packing.py",
        "np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)",
        "np.arange(ends[-1])",
        "tests/data/test_packing.py",
    ),
    mutant(
        "even rows past the budget", "data/packing.py",
        "(even := _even(rest, lengths, wanted, budget))",
        "(even := _even(rest, lengths, wanted, None))",
        "tests/data/test_packing.py",
    ),
    mutant(
        "a leak passes for rounding", "train/trial.py",
        "error <= (ROUNDING if fine else COARSE)",
        "error <= COARSE",
        "tests/train/test_trial.py",
    ),
    mutant(
        "the choice of packing is no part of a run", "train/loop.py",
        "self.identity[\"packing\"] = self.packing.packed",
        "pass",
        "tests/train/test_packing.py",
    ),
    mutant(
        "dropped entries pass a gradient", "kernels/linear.py",
        "dx.add_(dropped.zero_(d_low.mT @ A))",
        "dx.add_(d_low.mT @ A)",
        "tests/kernels/test_maps.py",
    ),
    mutant(
        "what is kept of a dropped input is not scaled", "kernels/linear.py",
        "Dropped(kept.dropped), low.s / (1 - low.p)",
        "Dropped(kept.dropped), low.s",
        "tests/kernels/test_maps.py",
    ),
    mutant(
        "a stretch without its part in the gradient", "kernels/linear.py",
        "dy = torch.addcmul(dy, dy, (low.stretch - 1).to(dy.dtype))",
        "pass",
        "tests/kernels/test_maps.py",
    ),
    mutant(
        "a norm's gradient keeps what lies along its output", "kernels/norm.py",
        "dx = torch.addcmul(grad, straight, along, value=-1)",
        "dx = grad.clone()",
        "tests/kernels/test_maps.py",
    ),
    mutant(
        "gaps one too long", "kernels/dropout.py",
        ".cumsum(0).sub_(1)",
        ".cumsum(0)",
        "tests/kernels/test_maps.py",
    ),
    mutant(
        "an input made again though it was changed", "deltas/fused.py",
        "found[0] if found is not None and found[1] == x._version else None",
        "found[0] if found is not None else None",
        "tests/deltas/test_fuse.py",
    ),
    mutant(
        "hooks inside an MLP passed by", "deltas/fused.py",
        "any(watched(m) or (isinstance(m, nn.Dropout) and m.p) for m in self.children())",
        "any(isinstance(m, nn.Dropout) and m.p for m in self.children())",
        "tests/deltas/test_fuse.py",
    ),
    mutant(
        "kernels run on a disabled model", "deltas/fuse.py",
        "switch.on = on",
        "pass",
        "tests/deltas/test_fuse.py",
    ),
    mutant(
        "positions off by one in the fused loss", "train/head.py",
        "F.pad(labels[:, 1:], (0, 1), value=IGNORED)",
        "F.pad(labels[:, :-1], (1, 0), value=IGNORED)",
        "tests/train/test_loss.py",
    ),
    mutant(
        "the scale of logits forgotten", "train/head.py",
        "softcap=cap, scale=scale",
        "softcap=cap",
        "tests/train/test_loss.py",
    ),
    mutant(
        "hooks on the head passed by", "train/head.py",
        "for module in (model, below, *route.above) for hooks",
        "for module in (model, below) for hooks",
        "tests/train/test_loss_routes.py",
    ),
    mutant(
        "the formula of the logits not confirmed", "train/head.py",
        "if least <= max(2 * rounding, 1e-5) else None",
        "if True else None",
        "tests/train/test_loss_routes.py",
    ),
    mutant(
        "the loss outside of autocast", "train/head.py",
        "with self.autocast:",
        "if True:",
        "tests/train/test_loss_routes.py",
    ),
    mutant(
        "kernels='plain' not heard by the loss", "train/head.py",
        "adaptation(below).kernels == \"plain\"",
        "False",
        "tests/train/test_loss_routes.py",
    ),
    mutant(
        "a soft cap without its slope", "kernels/cross_entropy.py",
        "p *= 1 - bent.square()",
        "pass",
        "tests/kernels/test_cross_entropy.py",
    ),
    mutant(
        "only the last chunk's gradient of the head", "kernels/cross_entropy.py",
        "total.addmm_(z.mT, h)",
        "total.addmm_(z.mT, h, beta=0)",
        "tests/kernels/test_cross_entropy.py",
    ),
    mutant(
        "rows that count misplaced", "kernels/cross_entropy.py",
        "index_copy_(0, rows, dh)",
        "index_copy_(0, torch.arange(len(rows)), dh)",
        "tests/kernels/test_cross_entropy.py",
    ),
    mutant(
        "a relayed gradient that is the states", "safety/relay.py",
        "self.gradients[number], self.begun = h.grad.to(\"cpu\"), None",
        "self.gradients[number], self.begun = h.detach(), None",
        "tests/safety/test_relay.py",
    ),
    mutant(
        "a relay that is not tried", "safety/relay.py",
        "if not _near(self.gradients[0], gradient):",
        "if False:",
        "tests/safety/test_relay.py",
    ),
    mutant(
        "the last of equal scores taken", "safety/topk.py",
        "equal = self.places[self.keys == key][:ties]", "equal = self.places[self.keys == key][-ties or 1 << 40 :]",
        "tests/safety/test_topk.py",
    ),
    mutant(
        "-0 below 0 among scores", "safety/topk.py",
        "bits = (wide + wide.dtype.type(0)).view(integer)",
        "bits = wide.view(integer)",
        "tests/safety/test_topk.py",
    ),
    mutant(
        "fused AdamW on transposed parameters", "train/optim.py",
        " and p.is_contiguous()",
        "",
        "tests/train/test_optim.py",
    ),
    mutant(
        "a changed tensor taken for the offloaded one", "train/memory.py",
        ", tensor._version)",
        ")",
        "tests/train/test_memory.py",
    ),
    mutant(
        "parameters are offloaded", "train/memory.py",
        "storage.data_ptr() in self._stay or ",
        "",
        "tests/train/test_memory.py",
    ),
    mutant(
        "halves of a byte change places", "quant/groups.py", "torch.stack((packed & 15, packed >> 4), -1)",
        "torch.stack((packed >> 4, packed & 15), -1)", "tests/quant/test_groups.py",
    ),
    mutant(
        "any change goes into the offsets", "quant/linear.py",
        "if not torch.equal(parts, parts[..., :1].expand_as(parts)):", "if False:", "tests/deltas/test_qalora.py",
    ),
    mutant(
        "scales follow a cast to 16 bit", "quant/base.py",
        "if moved and getattr(self, name).dtype is not self.scale_dtype():", "if False:", "tests/quant/test_linear.py",
    ),
    mutant(
        "a streamed Conv1D is quantised as it lies", "models/quantised.py",
        "W = W.mT if isinstance(linear, Conv1D) else W", "pass", "tests/models/test_quantised.py",
    ),
    mutant(
        "a start that looks at the weights finds codes", "models/quantised.py",
        "if plan is None or not any(group.spec.looks for group in plan.groups):", "if True:",
        "tests/models/test_quantised.py",
    ),
    mutant(
        "scales in a file are cast like weights", "models/quantised.py",
        "return dtype if is_float and not converter.collected_tensors else None", "return dtype if is_float else None",
        "tests/models/test_saved.py",
    ),
    mutant(
        "a saved model does not say which linears are plain", "deltas/save.py",
        '"llm_int8_skip_modules": plain,', '"llm_int8_skip_modules": [],', "tests/models/test_saved.py",
    ),
    mutant(
        "a start's part stays in the quantised base", "deltas/starts.py", "W - s * pair.B @ pair.A", "W",
        "tests/quant/test_base.py",
    ),
    mutant(
        "experts' orientation", "deltas/sites.py", "return W.mT if self.transposed else W", "return W",
        "tests/deltas/test_sites.py",
    ),
    mutant(
        "a closed gate adds zero", "deltas/heads.py", "torch.where(gate == 0, y, y + gate * term)", "y + gate * term",
        "tests/deltas/test_prefix.py",
    ),
    mutant(
        "a closed gate has no gradient", "deltas/heads.py", "(grad * term).sum_to_size(gate.shape)",
        "(grad * term * (gate != 0)).sum_to_size(gate.shape)", "tests/deltas/test_prefix.py",
    ),
    mutant(
        "one softmax scale for all", "deltas/heads.py", "if scaling is None else scaling)", "if scaling is None else query.shape[-1] ** -0.5)",
        "tests/deltas/test_prefix.py",
    ),
    mutant(
        "the prompt's keys have a position", "deltas/attention.py", "return cos.new_ones(shape), cos.new_zeros(shape)",
        "return cos[..., :1, :].expand(shape), positions[1][..., -1:, :].expand(shape)", "tests/deltas/test_prefix.py",
    ),
    mutant(
        "key-value heads in the wrong order", "deltas/heads.py", "t.repeat_interleave(groups, 1)", "t.repeat(1, groups, 1, 1)",
        "tests/deltas/test_prefix.py",
    ),
    mutant(
        "the prompt's rows are seen as tokens", "capture.py", "_UNSEEN.set(True)", "_UNSEEN.set(False)",
        "tests/deltas/test_prefix_models.py",
    ),
    mutant(
        "experts keep their adapted copy", "deltas/attach.py", 'del self.__dict__["_shown"]', "pass",
        "tests/conformance/test_experts.py",
    ),
    mutant(
        "kernels taken for experts", "deltas/sites.py", " and 1 not in p.shape[1:]", "", "tests/deltas/test_sites.py",
    ),
    mutant(
        "any embedding taken", "deltas/attach.py",
        'code is not None and {"super", "forward"} <= set(code.co_names) for', "True for",
        "tests/deltas/test_sites.py",
    ),
    mutant(
        "presets leave the blocks", "deltas/select.py",
        "for name, what in found.items() if name.startswith(inside)", "for name, what in found.items()",
        "tests/deltas/test_select.py",
    ),
    Mutant(
        "DoRA's norm not held fixed",
        (
            ("deltas/base.py", "return value.detach()", "return value"),
            ("deltas/dora.py", "    @torch.no_grad()\n    def norm", "    def norm"),
        ),
        ("tests/deltas/test_dora.py",),
    ),
    mutant(
        "the least important triplets kept", "deltas/budget.py", "scores[path] > threshold", "scores[path] < threshold",
        "tests/deltas/test_adalora.py",
    ),
    mutant(
        "pruned entries grow back", "deltas/budget.py", "if now or over:", "if False:", "tests/deltas/test_adalora.py",
    ),
    mutant(
        "a scaled output's bias left out", "deltas/ia3.py", "else self.scaled(bias)", "else bias", "tests/deltas/test_ia3.py",
    ),
    mutant(
        "a start's part counted as change", "deltas/lora.py", "change = change - self.B0 @ self.A0", "pass",
        "tests/deltas/test_init.py",
    ),
    mutant(
        "LoRA+ rate on A", "deltas/lora.py",
        '{"params": [self.A], "lr": lr}, {"params": [self.B], "lr": lr * self.lr_ratio}',
        '{"params": [self.A], "lr": lr * self.lr_ratio}, {"params": [self.B], "lr": lr}', "tests/deltas/test_lora.py",
    ),
    mutant(
        "alpha/r dropped", "deltas/lowrank.py",
        "return self.alpha / (math.sqrt(self.r) if self.rank_stabilised else self.r)", "return self.alpha",
        "tests/deltas/test_lora.py", "tests/conformance",
    ),
    mutant(
        "rank-stabilised scale not a root", "deltas/lowrank.py", "(math.sqrt(self.r) if self.rank_stabilised else self.r)", "self.r",
        "tests/deltas/test_lora.py", "tests/conformance",
    ),
    Mutant(
        "absolute value taken after the mean",
        (
            ("safety/snip.py", "[rows] += buffer.abs_()", "[rows] += buffer"),
            ("safety/snip.py", "total.mul_(magnitude).div_(n)", "total.mul_(magnitude).div_(n).abs_()"),
        ),
        ("tests/safety/test_scores.py",),
    ),
    mutant(
        "positions of the score off by one", "safety/calibration.py", "predicts = labels[1:] != IGNORED", "predicts = labels[:-1] != IGNORED",
        "tests/safety/test_scores.py",
    ),
    mutant(
        "Wanda's norm squared", "safety/score_files.py", "self._squares(path).sqrt().to(magnitude.dtype)", "self._squares(path).to(magnitude.dtype)",
        "tests/safety/test_scores.py",
    ),
    mutant(
        "positions of the loss off by one", "train/loss.py", "logits[:, :-1][counted]", "logits[:, 1:][counted]",
        "tests/train/test_loss.py",
    ),
    mutant("mask of the delta inverted", "deltas/freeze.py", "keep = ~self._mask(path)", "keep = self._mask(path)", "tests/deltas/test_freeze.py"),
    mutant("mask of the gradient inverted", "deltas/freeze.py", "gradient.masked_fill(mask, 0)", "gradient.masked_fill(~mask, 0)", "tests/deltas/test_freeze_variants.py"),
    mutant(
        "labels shifted", "data/chat.py", "for i, flag in zip(ids, counted, strict=True)",
        "for i, flag in zip(ids, [False, *counted[:-1]], strict=True)", "tests/data/test_labels.py",
    ),
    mutant(
        "weight decay on frozen entries", "deltas/freeze.py", "register_step_post_hook(lambda *_: self.restore())",
        "register_step_post_hook(lambda *_: None)", "tests/deltas/test_freeze.py",
    ),
    Mutant(
        "rewind in place of exact",
        (
            ("deltas/freeze.py", 'if self.variant in ("grad_mask", "exact"):', 'if self.variant == "grad_mask":'),
            ("deltas/freeze.py", 'if self.variant == "exact":\n            inner', 'if self.variant == "never":\n            inner'),
            ("deltas/freeze.py", 'if self.variant != "rewind" or', 'if self.variant not in ("rewind", "exact") or'),
        ),
        ("tests/train/test_freezing.py",),
    ),
    mutant(
        "entries not rewound", "deltas/freeze.py", "        self.restore()\n        self._mask_deltas()", "        self._mask_deltas()",
        "tests/deltas/test_freeze_variants.py",
    ),
    mutant(
        "other frozen entries taken for the same", "deltas/freeze.py", "digest.update(bits[path].tobytes())", "pass",
        "tests/deltas/test_freeze_variants.py", "tests/train/test_freezing.py",
    ),
    mutant(
        "set difference swapped", "safety/groups.py", "group = minus(safe, useful, name)", "group = minus(useful, safe, name)",
        "tests/safety/test_groups.py",
    ),
    mutant(
        "|W| quantiles unmatched", "safety/nulls.py", "np.uint8) if self.match is None else", "np.uint8) if True else",
        "tests/safety/test_nulls.py",
    ),
    mutant(
        "head axes transposed", "safety/units.py",
        "(*(Part(path, 0, size) for path in ((q, k, v) if own else (q,))), Part(o, 1, size))",
        "(*(Part(path, 1, size) for path in ((q, k, v) if own else (q,))), Part(o, 0, size))",
        "tests/safety/test_units.py",
    ),
    mutant(
        "surplus of a draw kept", "safety/sampling.py", "np.flatnonzero(missing < 0)", "np.flatnonzero(missing < -9999)",
        "tests/safety/test_nulls.py",
    ),
    mutant(
        "merged weight without its scale", "deltas/lora.py", "return self.kept(change.mul_(self.s))", "return self.kept(change)",
        "tests/deltas/test_lora.py", "tests/conformance",
    ),
    mutant(
        "RNG not restored on resume", "train/loop.py", 'rng.restore(mine, found.state["rng"][rank])', "_ = mine",
        "tests/train/test_resume.py::test_interrupted_and_continued_is_bitwise_the_same",
    ),
    mutant(
        "measuring draws from the run's generators", "train/rng.py", "        restore(*state)", "        pass",
        "tests/train/test_resume.py::test_measuring_changes_nothing",
    ),
    mutant(
        "drift without the change of the base", "measure/drift.py", "shift = None if self.W0 is None else", "shift = None if True else",
        "tests/measure",
    ),
    mutant(
        "Holm missing", "core/stats/significance.py", "values[order] * (len(values) - np.arange(len(values)))", "values[order]",
        "tests/core/test_stats.py", "tests/safety/test_verdicts.py", "tests/safety/test_rate_verdicts.py",
    ),
    mutant(
        "one-sided for two-sided", "safety/null_draws.py", '"p": min(1.0, 2 * min(p.values())),', '"p": min(p.values()),',
        "tests/safety/test_verdicts.py", "tests/studies/test_calibration.py",
    ),
    mutant(
        "chance of the entries left out over seeds", "safety/null_draws.py", "max(p[side], over.p(0.0, side))", "over.p(0.0, side)",
        "tests/safety/test_verdicts.py", "tests/studies/test_calibration.py",
    ),
    mutant(
        "prompts taken as fixed over seeds", "core/stats/means.py", "whole = ms_seed + ms_item - ms_rest", "whole = ms_seed",
        "tests/core/test_means.py",
    ),
    mutant(
        "selection and measurement on the same split", "studies/score_dynamics.py", '"measure": (self.data, slice(1, n, 2))',
        '"measure": (self.data, slice(0, n, 2))', "tests/studies/test_score_dynamics.py",
    ),
    mutant(
        "an arm compared with the free arm of another cell", "studies/conclusions.py", "if arm.cell == name]) for name", "]) for name",
        "tests/studies/test_conclusions.py",
    ),
    mutant(
        "a bank's padded rows counted in", "deltas/stacks.py",
        "change if where.real is None else change.index_select(0, where.real)", "change[: len(where.to)]",
        "tests/models/test_bank.py",
    ),
    Mutant(
        "a bank's rows are every thread's",
        (
            ("deltas/bank.py", "run = _RUNS.get({}).get(self.bank)", "run = RUNS.get(self.bank)"),
            ("deltas/bank.py", "    token = _RUNS.set({**_RUNS.get({}), bank: run})", "    before = RUNS.get(bank)\n    RUNS[bank] = run"),
            ("deltas/bank.py", "        _RUNS.reset(token)", "        RUNS[bank] = before"),
            ("deltas/bank.py", "class BankDelta(Delta):", "RUNS = {}\n\n\nclass BankDelta(Delta):"),
        ),
        ("tests/models/test_bank_load.py",),
    ),
    mutant(
        "a removed adapter is taken from who runs with it", "models/bank.py",
        "self._table = {other: adapter for other, adapter in self._table.items() if other != name}",
        "del self._table[name]; gone.entries.clear()", "tests/models/test_bank_load.py",
    ),
    mutant(
        "a sign elected by what agrees least", "deltas/combine.py", "sign = torch.stack(parts).sum(0).sign()",
        "sign = -torch.stack(parts).sum(0).sign()", "tests/deltas/test_combine.py",
    ),
    mutant(
        "dropped entries not made up for", "deltas/combine.py", "keep.to(change.device) / density",
        "keep.to(change.device)", "tests/deltas/test_combine.py",
    ),
    mutant(
        "what combining lost not told", "deltas/combine.py", "return _Best(found, norm, float(lost))",
        "return _Best(found, norm, 0.0)", "tests/deltas/test_combine.py",
    ),
    mutant(
        "nested scales without their mean", "quant/nf4.py", "quantise_scales(absmax - offset)", "quantise_scales(absmax)",
        "tests/quant/test_nf4.py",
    ),
    mutant(
        "an adapter beside reads the result", "deltas/bottleneck.py", "self.adapter(x if self.parallel else h)",
        "self.adapter(h)", "tests/deltas/test_bottleneck.py",
    ),
    mutant(
        "every expert acts on every token", "deltas/lora_experts.py", "torch.zeros_like(p).scatter(-1, chosen, top)", "p",
        "tests/deltas/test_lora_experts.py",
    ),
    mutant(
        "the balance counts a token once for all its experts", "deltas/lora_experts.py",
        "experts * assigned / (self.top_k * tokens) / tokens", "experts * assigned / tokens / tokens",
        "tests/deltas/test_lora_experts_balance.py",
    ),
    mutant(
        "an export forgets the scale", "models/vllm.py", "return A.detach(), s * B.detach()",
        "return A.detach(), B.detach()", "tests/models/test_export.py",
    ),
    mutant(
        "a correction beside the codes of the whole", "deltas/merge.py", "return linear.requantised(rest), pair",
        "return linear.requantised(W), pair", "tests/deltas/test_merge.py",
    ),
]  # fmt: skip


def copy(to: Path) -> None:
    """The package, the tests and their settings, away from the working tree."""
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", to / "src", ignore=skip)
    shutil.copytree(ROOT / "tests", to / "tests", ignore=skip)
    for name in ("pyproject.toml", "Makefile", "README.md"):
        shutil.copy(ROOT / name, to / name)


def run(project: Path, tests: tuple[str, ...], *more: str) -> tuple[int, str]:
    """(exit code, output) of pytest in the copy."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(project / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "not slow and not browser and not shared",
        "--tb=line",
        *more,
        *tests,
    ]
    try:
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return HANGS, f"not ended after {LIMIT} s"
    return done.returncode, done.stdout + done.stderr


def apply(project: Path, fault: Mutant) -> dict[Path, str]:
    """Put the fault in; returns the text that stood in each file."""
    before: dict[Path, str] = {}
    for name, old, new in fault.changes:
        path = project / "src" / "deltalab" / name
        text = path.read_text()
        before.setdefault(path, text)
        if text.count(old) != 1:
            sys.exit(f"{fault.name}: this stands {text.count(old)} times in {name}, not once: {old!r}")
        path.write_text(text.replace(old, new))
        compile(path.read_text(), str(path), "exec")
    return before


def main() -> None:
    """Exit 1 if the tests are not green without a fault, or stay green with one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="only these; all if none is given")
    parser.add_argument("--list", action="store_true", help="show the names")
    args = parser.parse_args()
    if args.list:
        print("\n".join(fault.name for fault in MUTANTS))
        return
    unknown = set(args.names) - {fault.name for fault in MUTANTS}
    if unknown:
        sys.exit(f"no such fault: {', '.join(unknown)}; see --list")
    faults = [fault for fault in MUTANTS if not args.names or fault.name in args.names]
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        project.mkdir()
        copy(project)
        code, said = run(
            project,
            tuple(dict.fromkeys(test for fault in faults for test in fault.tests)),
            "-n",
            "2",
            "--dist",
            "loadfile",
        )
        if code != GREEN:
            sys.exit(f"the tests are not green without a fault:\n{said[-3000:]}")
        print(f"without a fault: {said.strip().splitlines()[-1]}", flush=True)
        survived = [fault.name for fault in faults if not killed(project, fault)]
    if survived:
        sys.exit(f"{len(survived)} of {len(faults)} faults went unseen: {', '.join(survived)}")
    print(f"all {len(faults)} faults turn the tests red")


def killed(project: Path, fault: Mutant) -> bool:
    """Whether a test fails with the fault in. Prints which."""
    began = time.monotonic()
    before = apply(project, fault)
    try:
        code, said = run(project, fault.tests, "-x")
    finally:
        for path, text in before.items():
            path.write_text(text)
    failed = [line for line in said.splitlines() if line.startswith("FAILED")]
    seen = code == RED and bool(failed)
    by = failed[0].split()[1] if failed else f"pytest exit {code}: {(said.strip().splitlines() or [''])[-1]}"
    print(f"{'red' if seen else 'UNSEEN':<7} {fault.name:<44} {time.monotonic() - began:5.0f} s  {by}", flush=True)
    return seen


if __name__ == "__main__":
    main()
