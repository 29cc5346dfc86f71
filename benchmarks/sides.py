"""A training step as each side takes it, on one model: ours, peft's, and the limit, the frozen base alone.

Random Llamas of two sizes, every weight drawn anew from one seed, so all sides have the same base. Deltas get the same A
and B (B is not zero), each place of its own seed. Both sides train fp32 adapters on the frozen base, in fp32 or bf16, with
torch's fused AdamW, which is what `transformers.Trainer` uses by itself too.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers
from torch import Tensor, nn

import deltalab as dl
from benchmarks.harness import Check, apart
from deltalab.deltas.quantise import quantise
from deltalab.quant.linear import quantiser
from deltalab.train.loss import nll_sum
from deltalab.train.optim import make_optimizer
from deltalab.train.spec import OptimSpec

SIZES = {"S": 512, "L": 1024}
"""Hidden states. The MLP is 2.75 times as wide: a multiple of 64, over whose blocks of 4-bit codes bitsandbytes is right on a CPU.
Heads are of 64."""
TARGETS = {
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "q,v": ["q_proj", "v_proj"],
}
KINDS = {"A": "A", "B": "B", "m": "m", "lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "m"}
RATE, ALPHA = 1e-4, 16.0


@dataclass(frozen=True)
class Case:
    """What is trained on what. vocabulary: rows of the head, which is frozen and not tied. masked: part of each sequence,
    from its start, whose labels do not count. method: lora or dora. quantised: the linears of the blocks to NF4, scales nested."""

    size: str = "S"
    dtype: torch.dtype = torch.bfloat16
    targets: str = "all-linear"
    dropout: float = 0.0
    method: str = "lora"
    quantised: bool = False
    vocabulary: int = 2048
    masked: float = 0.0
    r: int = 8
    sequences: int = 4
    tokens: int = 256
    layers: int = 4

    def __str__(self) -> str:
        parts = [
            f"hidden {SIZES[self.size]}",
            str(self.dtype)[6:].replace("bfloat16", "bf16").replace("float32", "fp32"),
            self.targets,
        ]
        parts += [f"dropout {self.dropout:g}"] if self.dropout else []
        parts += [f"r {self.r}"] if self.r != 8 else []
        parts += [f"{self.layers} layers"] if self.layers != 4 else []
        parts += [f"{self.sequences} × {self.tokens} tokens", f"vocabulary {self.vocabulary}"]
        parts += [f"{100 * self.masked:.0f} % of labels masked"] if self.masked else []
        return ", ".join(parts)


def base(case: Case) -> transformers.PreTrainedModel:
    """The same at every call; frozen, and in training mode."""
    hidden = SIZES[case.size]
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=case.layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
        intermediate_size=hidden * 11 // 4, vocab_size=case.vocabulary, max_position_embeddings=max(512, case.tokens),
        use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(case.dtype).requires_grad_(False).train()


def batch(case: Case) -> dict[str, Tensor]:
    ids = torch.randint(5, case.vocabulary, (case.sequences, case.tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : round(case.masked * case.tokens)] = -100
    return {"input_ids": ids, "labels": labels}


@dataclass
class Side:
    """A model that trains. loss: the mean over the counted tokens, with its graph."""

    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer | None = None

    def step(self) -> None:
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The loss, and the gradient of each place's A, B and m."""
        loss = self.loss()
        loss.backward()
        trained = {place(name): p for name, p in self.model.named_parameters() if p.requires_grad}
        found = {name: p.grad.detach().clone() for name, p in trained.items() if p.grad is not None}
        self.model.zero_grad()
        return float(loss.detach()), found


def place(name: str) -> str:
    """`3.q_proj.A` of a parameter's name on either side; the name itself where it is no adapter's."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part == "layers"), None)
    kind = next((KINDS[part] for part in reversed(parts) if part in KINDS), None)
    return name if at is None or kind is None else f"{parts[at + 1]}.{parts[at + 3]}.{kind}"


def ours(case: Case, model: nn.Module | None = None, kernels: str = "auto") -> Side:
    """deltalab: its adapted model, loss and optimizer."""
    model = base(case) if model is None else model
    if case.quantised:
        quantise(model, quantiser("nf4"))
    method = {"lora": dl.LoRA, "dora": dl.DoRA}[case.method]
    dl.adapt(model, method(r=case.r, alpha=ALPHA, dropout=case.dropout, targets=case.targets), kernels=kernels)
    filled(model).train()
    data = batch(case)
    counted = int((data["labels"][:, 1:] != -100).sum())
    optimizer = make_optimizer(model, OptimSpec(lr=RATE))
    return Side(model, lambda: nll_sum(model, data) / counted, optimizer)


def theirs(case: Case, model: Any = None) -> Side:
    """peft, as its documents have it: `model(labels=).loss`."""
    model = base(case) if model is None else model
    if case.quantised:
        by_bitsandbytes(model)
    config = peft.LoraConfig(
        r=case.r, lora_alpha=ALPHA, lora_dropout=case.dropout, target_modules=TARGETS[case.targets],
        use_dora=case.method == "dora", task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted: Any = peft.get_peft_model(model, config)
    filled(adapted).train()
    data = batch(case)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    return Side(adapted, lambda: adapted(**data).loss, optimizer)


def limit(case: Case) -> Side:
    """The frozen base's forward and the gradients of its activations, down to the embeddings; there is no adapter."""
    model, data = base(case), batch(case)
    embedded = model.get_input_embeddings()(data["input_ids"])

    def loss() -> Tensor:
        return model(inputs_embeds=embedded.detach().requires_grad_(), labels=data["labels"]).loss

    return Side(model, loss)


def exact(case: Case) -> Side:
    """peft's model in fp64, from the values that the base has in its dtype."""
    model = base(case)
    if case.quantised:
        for linear in by_bitsandbytes(model):
            made = nn.Linear(linear.in_features, linear.out_features, bias=False)
            made.weight = nn.Parameter(bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state))
            replace_module(model, linear, made)
    return theirs(replace(case, quantised=False, dropout=0.0), model.double())


def by_bitsandbytes(model: nn.Module) -> list[nn.Module]:
    """Every linear of the blocks as bitsandbytes' NF4, in place; returns them."""
    made = []
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name.endswith(tuple(TARGETS["all-linear"])):
            dtype = linear.weight.dtype
            four = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype,
                                     quant_type="nf4", compress_statistics=True)  # fmt: skip
            four.load_state_dict(linear.state_dict())
            made.append(four.to("cpu").requires_grad_(False))
            replace_module(model, linear, four)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what peft asks
    return made


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, module in model.named_modules() if module is old)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


def filled(model: nn.Module) -> nn.Module:
    """A and B of each place, of the place's own seed: equal on all sides."""
    for name, p in model.named_parameters():
        found = re.fullmatch(r"(\d+)\.(\w+)\.([AB])", place(name))
        if p.requires_grad and found:
            seed = int(found[1]) * 64 + TARGETS["all-linear"].index(found[2]) * 2 + (found[3] == "B")
            drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                p.copy_(drawn * (1 / math.sqrt(p.shape[1]) if found[3] == "A" else 0.02))
    return model


def checks(case: Case, mine: Side | None = None, other: Side | None = None) -> list[Check]:
    """Loss and gradients of both sides, before a step: of each other, and of each to fp64. With dropout, of twins without.

    In bf16 ours may be no further from fp64 than peft's, but for a tenth; of a few tokens a quarter, by which chance sets two right
    answers apart.
    """
    if case.dropout or mine is None or other is None:
        case = replace(case, dropout=0.0)
        mine, other = ours(case), theirs(case)
    (loss, got), (their_loss, want) = mine.gradients(), other.gradients()
    _, true = exact(case).gradients()
    wide = case.dtype is torch.float32
    keys = sorted(true)
    if not sorted(got) == sorted(want) == keys:
        raise AssertionError(f"the sides train different tensors: {set(got) ^ set(want)}")
    error, their_error = (apart([g[k] for k in keys], [true[k] for k in keys]) for g in (got, want))
    return [
        Check("loss", abs(loss - their_loss) / their_loss, 1e-6 if wide else 1e-3),
        Check("gradients", apart([got[k] for k in keys], [want[k] for k in keys]), 1e-4 if wide else 5e-2),
        Check("ours to fp64", error, max(1e-5, (1.1 if case.sequences * case.tokens >= 1024 else 1.25) * their_error)),
        Check("peft's to fp64", their_error, 1e-5 if wide else 5e-2),
    ]
