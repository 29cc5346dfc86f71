"""Bottleneck adapters against hooks that compute h + s·Uσ(D h) beside a plain model, and where they go in each family."""

import pytest
import torch
import transformers
from torch.nn import functional as F

import deltalab as dl
from deltalab.deltas.adapt import attached, is_adapted, param_groups
from tests.deltas.perturb import perturbed, states_equal
from tests.families import inputs, logits, loss_of, model_of
from tests.helpers import assert_close_by_norm

ACTIVATIONS = {"gelu": F.gelu, "relu": torch.relu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}  # fmt: skip


def hooked(model, values, spec):
    """The same adapters as forward hooks on a plain model. values: path -> tensors by name; all require gradients."""

    def hook(path):
        own = values[path]

        def after(module, args, kwargs, result):
            h = result[0] if isinstance(result, tuple) else result
            x = (args[0] if args else kwargs["hidden_states"]) if spec.placement == "parallel" else h
            if spec.norm:
                mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
                x = (x - mean) / torch.sqrt(variance + 1e-5) * own["norm.weight"] + own["norm.bias"]
            down = x @ own["D"].T
            if spec.bias:
                down = down + own["D_bias"]
            up = ACTIVATIONS[spec.activation](down) @ own["U"].T
            if spec.bias:
                up = up + own["U_bias"]
            y = h + (own["s"] if spec.scale == "learned" else spec.scale) * up
            return (y, *result[1:]) if isinstance(result, tuple) else y

        return after

    for path in values:
        model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True)
    return model


SPECS = {
    "sequential": dl.Bottleneck(size=3),
    "parallel": dl.Bottleneck(size=3, placement="parallel", scale=4.0, activation="relu"),
    "norm-learned": dl.Bottleneck(reduction=8, norm=True, scale="learned", activation="tanh", bias=False),
    "parallel-norm": dl.Bottleneck(reduction=8, norm=True, placement="parallel", activation="silu"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5", "bert"])
def test_against_hooks_on_a_plain_model(family, spec):
    """Logits and every gradient, in fp64."""
    if family == "bert" and spec.placement == "parallel":
        with pytest.raises(dl.UserError, match=r"parallel.*attention\.output\.dense"):
            dl.adapt(model_of(family), spec)
        return
    model, plain = model_of(family).double(), model_of(family).double()
    if family == "mixtral":
        model.config._experts_implementation = plain.config._experts_implementation = "eager"
    perturbed(dl.adapt(model, spec), 0.3)
    deltas = attached(model)
    values = {
        path: {name: p.detach().clone().requires_grad_() for name, p in delta.named_parameters()}
        for path, delta in deltas.items()
    }
    assert {"D", "U"} <= values[next(iter(values))].keys()
    theirs, ours = hooked(plain, values, spec)(**inputs(plain)), model(**inputs(model))
    assert_close_by_norm(ours.logits, theirs.logits, 1e-10)
    with dl.disabled(model):
        assert not torch.equal(ours.logits, model(**inputs(model)).logits)
    ours.loss.backward()
    theirs.loss.backward()
    for path, delta in deltas.items():
        for name, parameter in delta.named_parameters():
            assert_close_by_norm(parameter.grad, values[path][name].grad, 1e-10)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh", "sigmoid", "identity"])
def test_every_activation(activation):
    model = perturbed(dl.adapt(model_of("llama").double(), dl.Bottleneck(targets="mlp", activation=activation)))
    mlp, plain = model.model.layers[0].mlp, model_of("llama").double().model.layers[0].mlp
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    h, delta = plain(x), mlp.delta
    act = ACTIVATIONS.get(activation, lambda t: t)
    want = h + act(h @ delta.D.T + delta.D_bias) @ delta.U.T + delta.U_bias
    assert_close_by_norm(mlp(x), want, 1e-12)


def test_the_middle_and_what_trains():
    model = dl.adapt(model_of("llama"), dl.Bottleneck(reduction=5, norm=True, scale="learned"))  # 32 / 5 -> 6
    delta = model.model.layers[0].mlp.delta
    assert delta.D.shape == (6, 32)
    each = 6 * 32 * 2 + 6 + 32 + 2 * 32 + 1
    assert dl.trainable(model).count == 4 * each
    assert dl.trainable(model).total == sum(p.numel() for p in model_of("llama").parameters())
    assert dl.measures(model)["model.layers.0.mlp"] == {"scale": 1.0}
    assert dl.adapt(model_of("llama"), dl.Bottleneck()).model.layers[0].mlp.delta.D.shape == (2, 32)


def test_dropout_is_of_the_middle_and_in_training_alone():
    model = perturbed(dl.adapt(model_of("llama"), dl.Bottleneck(size=4, targets="mlp", dropout=0.5, layers=[0])))
    assert torch.equal(logits(model), logits(model))
    mlp, x = model.model.layers[0].mlp.train(), torch.randn(1, 3, 32)
    h, delta = type(mlp).adapts.forward(mlp, x), mlp.delta
    torch.manual_seed(0)
    got = mlp(x)
    torch.manual_seed(0)
    middle = F.dropout(F.gelu(h @ delta.D.T + delta.D_bias), 0.5)
    assert_close_by_norm(got, h + middle @ delta.U.T + delta.U_bias, 1e-6)
    assert not torch.equal(got, mlp.eval()(x))


def test_results_beside_the_hidden_states_pass():
    """Attention weights and the router's logits are those that the adapted blocks computed."""
    for family, beside in (("gpt2", "attentions"), ("mixtral", "router_logits"), ("t5", "cross_attentions")):
        model = model_of(family)
        if beside != "router_logits":
            model.set_attn_implementation("eager")
        flag = "output_router_logits" if beside == "router_logits" else "output_attentions"
        want = model(**inputs(model), **{flag: True})[beside]
        dl.adapt(model, dl.Bottleneck())
        got = model(**inputs(model), **{flag: True})[beside]
        assert len(got) == len(want) == 2
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        perturbed(model)
        moved = model(**inputs(model), **{flag: True})[beside]
        assert not torch.equal(moved[1], want[1])


def test_it_is_called_by_place_and_by_name():
    model = perturbed(dl.adapt(model_of("llama"), dl.Bottleneck(targets="mlp")))
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 3, 32)
    assert torch.equal(mlp(x), mlp(x=x))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"targets": "self_atn"}, ["'self_atn'", "self_attn", "attention,mlp"]),
        ({"targets": ["mpl"]}, ["'mpl'", "mlp"]),
        ({"layers": [7]}, ["layers [7]", "2 layers"]),
        ({"targets": ["layers.0.*"], "layers": [1]}, ["layers.0.*", "layers [1]"]),
        ({"targets": "q_proj", "placement": "parallel"}, ["parallel", "q_proj", "sequential"]),
        ({"targets": "embed_tokens"}, ["embed_tokens", "an embedding"]),
        ({"reduction": 64}, ["reduction=64", "32", "size=1"]),
    ],
)
def test_mistakes_name_what_is_there(spec, said):
    model = model_of("llama")
    with pytest.raises(dl.UserError) as error:
        dl.adapt(model, dl.Bottleneck(**spec))
    for words in said:
        assert words in str(error.value)
    assert states_equal(model, model_of("llama"))


@pytest.mark.parametrize("fields", [{"size": 4, "reduction": 8}, {"scale": 0}, {"size": 0}, {"activation": "gleu"}])
def test_specs_that_mean_nothing(fields):
    with pytest.raises(dl.UserError):
        dl.Bottleneck(**fields)


def test_a_model_without_known_sublayers_is_told_so():
    model = transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(d_model=32, n_layer=1, n_head=4, d_inner=64, vocab_size=50)
    )
    with pytest.raises(dl.UserError, match="matches no sub-layer"):
        dl.adapt(model, dl.Bottleneck())
    assert not is_adapted(model)
    assert list(attached(dl.adapt(model, dl.Bottleneck(targets="layer_2")))) == ["transformer.layer.0.ff.layer_2"]


def test_lora_inside_and_own_weights_beside(tmp_path):
    """One adapter of three kinds: saved, loaded, trained, refused where it would merge."""
    specs = [dl.Bottleneck(), dl.LoRA(targets="attention"), dl.Train("norms")]
    model = dl.adapt(model_of("llama"), specs)
    assert torch.equal(logits(model), logits(model_of("llama")))
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2))
    losses = []
    for _ in range(8):
        loss = loss_of(model)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    kinds = {row[0] for row in dl.trainable(model).rows}
    assert kinds == {"Bottleneck", "LoRA", "own"}
    with pytest.raises(dl.UserError, match=r"self_attn' depends on the input"):
        dl.merged(model)
    dl.save_adapter(model, tmp_path)
    again = dl.load_adapter(model_of("llama"), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert states_equal(dl.unload(model), model_of("llama"))
    other = model_of("gpt2")
    with pytest.raises(dl.UserError, match="which GPT2LMHeadModel does not have"):
        dl.load_adapter(other, tmp_path)
    assert not is_adapted(other)
