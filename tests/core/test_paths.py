"""Names of modules: short where that says which, longer where a layer has several of one name."""

from deltalab.core.paths import kinds_of, layer_in


def test_the_last_name_where_it_says_which():
    paths = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.11.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "lm_head",
    ]
    assert list(kinds_of(paths).values()) == ["q_proj", "q_proj", "up_proj", "lm_head"]
    assert [layer_in(path) for path in paths] == [0, 11, 0, None]
    assert kinds_of([]) == {}


def test_several_of_one_name_in_a_layer():
    paths = ["bert.encoder.layer.3.attention.output.dense", "bert.encoder.layer.3.intermediate.dense",
             "bert.encoder.layer.3.output.dense", "bert.pooler.dense"]  # fmt: skip
    assert list(kinds_of(paths).values()) == [
        "attention.output.dense",
        "intermediate.dense",
        "layer.output.dense",
        "pooler.dense",
    ]
    assert kinds_of(paths[1:2]) == {paths[1]: "dense"}


def test_two_stacks_and_experts():
    paths = [
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
    ]
    assert list(kinds_of(paths).values()) == ["encoder.….q", "decoder.….q", "EncDecAttention.q"]
    experts = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(3)]
    assert set(kinds_of([*experts, "model.layers.0.mlp.shared.up_proj"]).values()) == {
        "experts.up_proj",
        "shared.up_proj",
    }


def test_a_path_that_is_the_end_of_another():
    assert list(kinds_of(["dense", "output.dense"]).values()) == ["dense", "output.dense"]
