"""Units against loops over every entry: whose it is, its unit's mean, and the top of them, on real and random models."""

import numpy as np
import pytest
import torch
import transformers

from deltalab.core.errors import UserError
from deltalab.deltas.base import weight_of
from deltalab.models.load import load
from deltalab.safety.groups import difference, top
from deltalab.safety.units import Units, units_of
from tests.helpers import SHARED, tiny_gpt2, tiny_llama

KINDS = ("row", "column", "mlp-unit", "head")


def head_of(model, name, row, column):
    """The head that an entry of a plain Llama belongs to, from how transformers reshapes q, k, v and the output."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared = config.num_key_value_heads != config.num_attention_heads
    if name == "q_proj" or (name in ("k_proj", "v_proj") and not shared):
        return row // size
    return column // size if name == "o_proj" else None


def owner(model, kind, path, row, column):
    """The family of a matrix's entries and the unit of each, or None; row, column: of every entry, flat."""
    parent, _, name = path.rpartition(".")
    match kind:
        case "row":
            return path, row
        case "column":
            return path, column
        case "mlp-unit":
            return {"gate_proj": (parent, row), "up_proj": (parent, row), "down_proj": (parent, column)}.get(name)
    head = head_of(model, name, row, column)
    return None if head is None else (parent, head)


def owners(model, kind, shapes):
    """path → (family, the unit of each flat entry), or None."""
    found = {}
    for path, (out, in_) in shapes.items():
        row, column = np.divmod(np.arange(out * in_), in_)
        found[path] = owner(model, kind, path, row, column)
    return found


def brute_top(means, q, per):
    """The units of the largest means, the first of equal ones, by sorting. means: (family, unit) → mean, in order."""
    order = {unit: i for i, unit in enumerate(means)}
    families = {} if per == "matrix" else {None: list(means)}
    if per == "matrix":
        for unit in means:
            families.setdefault(unit[0], []).append(unit)
    chosen = set()
    for units in families.values():
        k = int(q * len(units) + 0.5)
        chosen |= set(sorted(units, key=lambda u: (-means[u], order[u]))[:k])
    return chosen


def check(model, kind, values, q, per):
    units = units_of(model, kind)
    whose = owners(model, kind, units.shapes)
    sums, counts = {}, {}
    for path, owned in whose.items():
        if owned is not None:
            family, unit = owned
            weighted = np.bincount(unit, values[path].double().numpy().ravel())
            for u, (value, n) in enumerate(zip(weighted.tolist(), np.bincount(unit).tolist(), strict=True)):
                sums[family, u] = sums.get((family, u), 0.0) + value
                counts[family, u] = counts.get((family, u), 0) + n
    means = units.means(values)
    in_order = {(name, u): sums[name, u] / counts[name, u] for name, n in units.counts.items() for u in range(n)}
    assert len(in_order) == len(sums)
    for name, mean in means.items():
        want = torch.tensor([in_order[name, u] for u in range(len(mean))], dtype=torch.float64)
        assert torch.allclose(mean, want, rtol=1e-12, atol=0)
    exact = {(name, u): float(mean[u]) for name, mean in means.items() for u in range(len(mean))}
    chosen = brute_top(exact, q, per)
    group = top(values, q, per, units=units)
    for path in group:
        family, unit = whose[path] or ("", np.zeros(0, int))
        taken = [u for name, u in chosen if name == family]
        assert np.array_equal(group[path].numpy(), np.flatnonzero(np.isin(unit, taken)))
    assert (group.unit, group.info["units"], group.info["of_units"]) == (kind, len(chosen), len(exact))
    assert group.fraction == sum(counts[unit] for unit in chosen) / sum(v.numel() for v in values.values())
    taken = units.of_group(group)
    assert {(name, int(u)) for name in taken for u in taken[name]} == chosen


def values_of(units, levels=None, seed=0):
    rng = torch.Generator().manual_seed(seed)
    values = {path: torch.rand(shape, generator=rng) for path, shape in units.shapes.items()}
    return values if levels is None else {path: (value * 0 + 1) for path, value in values.items()}


@pytest.mark.parametrize("per", ["matrix", "global"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["own keys", "grouped queries"])
def test_units_are_those_of_a_loop_over_entries(kind, per, heads):
    model = tiny_llama(heads=heads[0], kv_heads=heads[1])
    check(model, kind, values_of(units_of(model, kind)), 0.25, per)


@pytest.mark.parametrize("per", ["matrix", "global"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_equal_units_the_first_are_taken(kind, per):
    model = tiny_llama()
    check(model, kind, values_of(units_of(model, kind), levels=1), 0.3, per)


SCORES = ("magnitude", "wanda", "snip")


def scored(model, score):
    """Scores of a real model's weights: |W|; times the norms of random inputs; or |W ⊙ ∇L| of some random tokens."""
    rng = torch.Generator().manual_seed(3)
    weights = {path: model.get_parameter(f"{path}.weight") for path in units_of(model, "entry").shapes}
    if score == "snip":
        ids = torch.randint(5, 300, (2, 32), generator=rng)
        gradients = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(weights.values()))
        return {path: (w * g).abs().detach() for (path, w), g in zip(weights.items(), gradients, strict=True)}
    size = 1 if score == "magnitude" else 64
    norms = {path: torch.randn(size, w.shape[1], generator=rng).norm(dim=0) for path, w in weights.items()}
    return {path: w.detach().abs() * (norms[path] if size > 1 else 1) for path, w in weights.items()}


def check_entries(values, q, per):
    """The top against numpy's stable sort of the negated scores."""
    group = top(values, q, per)
    parts = {path: v.numpy().reshape(-1, v.shape[1] if per == "row" else v.numel()) for path, v in values.items()}
    if per == "global":
        parts = {"": np.concatenate([part.ravel() for part in parts.values()])[None]}
    masks = {}
    for path, part in parts.items():
        k = int(q * part.shape[1] + 0.5)
        chosen = np.argsort(-part, axis=1, kind="stable")[:, :k]
        masks[path] = np.zeros(part.shape, dtype=bool)
        np.put_along_axis(masks[path], chosen, True, axis=1)
    if per == "global":
        sizes = np.cumsum([v.numel() for v in values.values()])[:-1]
        masks = dict(zip(values, np.split(masks[""].ravel(), sizes), strict=True))
    for path, mask in masks.items():
        assert np.array_equal(group.mask(path).numpy().ravel(), mask.ravel())


def check_all(model, score):
    """Every unit and comparison group of one score."""
    values = scored(model, score)
    for per in ("row", "matrix", "global"):
        check_entries(values, 0.05, per)
    for kind in KINDS:
        for per in ("matrix", "global"):
            check(model, kind, values, 0.25, per)


@pytest.mark.parametrize("score", SCORES)
def test_groups_of_the_organism(score):
    check_all(load("organism")[0], score)


@pytest.mark.shared
@pytest.mark.skipif(SHARED is None, reason="the models beside the project are not there")
@pytest.mark.parametrize("score", SCORES)
def test_groups_of_a_trained_model(score):
    check_all(load(str(SHARED / "models" / "tok361_hf"))[0], score)


@pytest.mark.parametrize("per", ["row", "matrix", "global"])
def test_entries_of_a_small_model(per):
    check_entries(scored(tiny_llama(vocab=300), "snip"), 0.07, per)


def zeroed(model, units, family, unit):
    """Set one unit's entries to zero in the model."""
    with torch.no_grad():
        for path, owning in units.owner.items():
            if owning.name == family:
                index = units.entries(path, torch.tensor([unit]))
                flat = weight_of(model.get_submodule(path)).clone().flatten()
                flat[index] = 0
                weight_of(model.get_submodule(path)).copy_(flat.view(units.shapes[path]))


def gpt_neox():
    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=270,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config).eval()


def phi3():
    config = transformers.Phi3Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48,
        vocab_size=270, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config).eval()


def opt():
    config = transformers.OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=270, word_embed_proj_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).eval()


def explicit_head_dim():
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=24,
        intermediate_size=48, vocab_size=270, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "build", [tiny_llama, tiny_gpt2, gpt_neox, phi3, opt, explicit_head_dim], ids=lambda build: build.__name__
)
def test_a_head_without_its_entries_gives_nothing(build):
    """Zeroing head h silences head h in the attention's output, and no other: seen at the input of the output matrix."""
    model = build()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    units = units_of(model, "head")
    assert set(units.counts.values()) == {4}
    ids = torch.randint(5, 200, (1, 7))
    family = next(iter(units.families.values()))
    output = model.get_submodule(family.parts[-1].path)
    size = units.shapes[family.parts[-1].path][1] // 4
    kept = {}
    output.register_forward_pre_hook(lambda _, args: kept.update(x=args[0].detach().clone()))

    def heads():
        model(input_ids=ids)
        return kept["x"].view(1, 7, 4, size)

    before = heads()
    zeroed(model, units, family.name, 2)
    after = heads()
    untouched = [0, 1, 3]
    assert torch.equal(after[:, :, untouched], before[:, :, untouched])
    if units.note:  # grouped queries: the values stay, the attention is flat
        assert not torch.allclose(after[:, :, 2], before[:, :, 2])
    else:
        assert after[:, :, 2].abs().max() == 0
    columns = weight_of(output).view(-1, 4, size)
    assert columns[:, 2].abs().max() == 0
    assert columns[:, untouched].abs().min() > 0


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, gpt_neox, opt], ids=lambda build: build.__name__)
def test_an_mlp_unit_without_its_entries_is_silent(build):
    model = build()
    for name, parameter in model.named_parameters():
        parameter.data = torch.zeros_like(parameter) if name.endswith("bias") else torch.randn_like(parameter) * 0.2
    units = units_of(model, "mlp-unit")
    family = next(iter(units.families.values()))
    last = model.get_submodule(family.parts[-1].path)
    kept = {}
    last.register_forward_pre_hook(lambda _, args: kept.update(x=args[0].detach().clone()))
    ids = torch.randint(5, 200, (1, 7))
    model(input_ids=ids)
    before = kept["x"].reshape(7, -1)
    zeroed(model, units, family.name, 5)
    model(input_ids=ids)
    after = kept["x"].reshape(7, -1)
    assert after.shape[1] == family.size
    assert after[:, 5].abs().max() == 0
    others = [i for i in range(family.size) if i != 5]
    assert torch.equal(after[:, others], before[:, others])
    assert weight_of(last)[:, 5].abs().max() == 0


def test_what_cannot_be_parted_is_refused_by_name():
    with pytest.raises(UserError, match=r"'model\.layers\.0\.mlp' of .* cannot be parted into mlp-unit"):
        units_of(phi3(), "mlp-unit")
    strange = tiny_llama()
    strange.model.layers[1].self_attn.gate = torch.nn.Linear(32, 32)
    with pytest.raises(UserError, match=r"'model\.layers\.1\.self_attn' of .* cannot be parted into head"):
        units_of(strange, "head")
    wide = tiny_llama()
    wide.config.head_dim = 16
    with pytest.raises(UserError, match="cannot be parted into head"):
        units_of(wide, "head")
    with pytest.raises(UserError, match="'neuron' is no unit"):
        units_of(wide, "neuron")


def test_grouped_queries_are_said():
    assert "belong to no head" in str(units_of(tiny_llama(), "head"))
    assert units_of(tiny_llama(kv_heads=4), "head").note == ""
    assert "head: 8 units in 2 families of 4" in str(units_of(tiny_llama(), "head"))


def test_units_that_cannot_be_chosen():
    model = tiny_llama()
    units = units_of(model, "row")
    values = values_of(units)
    with pytest.raises(UserError, match="do not lie in one row"):
        top(values, 0.1, "row", units=units)
    with pytest.raises(UserError, match="less than one head unit"):
        top(values, 0.05, units=units_of(model, "head"))
    values.pop("model.layers.0.mlp.up_proj")
    with pytest.raises(UserError, match=r"need 'model\.layers\.0\.mlp\.up_proj'"):
        top(values, 0.25, units=units_of(model, "mlp-unit"))
    assert isinstance(units_of(model, "entry"), Units)
    assert top(values, 0.1, units=units_of(model, "entry")).info == top(values, 0.1).info


def test_the_difference_of_units():
    model = tiny_llama()
    units = units_of(model, "mlp-unit")
    a, b = values_of(units, seed=1), values_of(units, seed=2)
    got = difference(a, b, p=0.3, q=0.4, units=units)
    safe, useful = (units.of_group(top(v, q, units=units)) for v, q in ((a, 0.4), (b, 0.3)))
    for family, taken in units.of_group(got).items():
        assert set(taken.tolist()) == set(safe[family].tolist()) - set(useful[family].tolist())
    assert (got.unit, got.asked) == ("mlp-unit", 0.4)
