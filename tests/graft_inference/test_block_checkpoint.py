"""A block head's checkpoint: native and speculators' dialects, what engines read of them, and strict loading."""

import json
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft_inference.errors import GraftError
from graft_inference.heads.block.checkpoint import load_block_head, save_block_head
from graft_inference.heads.block.keys import LAYER
from graft_inference.heads.block.view import SlidingWindow
from graft_inference.heads.checkpoint import OF_SPECULATORS as OF_SPECULATORS_KEYS
from graft_inference.heads.checkpoint import Verifier
from graft_inference.heads.eagle3.checkpoint import load_head
from graft_inference.heads.families import load_any_head

from .test_block_head import block_head

DSPARK = {"sample_from_anchor": True, "markov_rank": 3}
SLIDING = {"causal": True, "sliding": SlidingWindow((0, 1), 7)}
MIXED = {"causal": None, "sliding": SlidingWindow((1,), 3, from_anchor=True)}
KINDS = [
    {},
    {"causal": True},
    {"draft_vocab_size": 5},
    DSPARK,
    {"sample_from_anchor": True},
    {"markov_rank": 3},
    SLIDING,
    MIXED,
    DSPARK | {"causal": False, "sliding": SlidingWindow((0,), 7)},
]


def saved(directory, **changes):
    save_block_head(block_head(**changes).float(), directory)
    return directory


def edit_config(directory, edit):
    values = json.loads((directory / "config.json").read_text())
    edit(values)
    (directory / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("changes", KINDS)
def test_round_trip_keeps_config_tensors_and_vocabulary(tmp_path, changes):
    head, loaded = block_head(**changes).float(), load_block_head(saved(tmp_path, **changes))
    assert loaded.config == head.config
    assert torch.equal(loaded.target_ids, head.target_ids)
    assert loaded.state_dict().keys() == head.state_dict().keys()
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def to_speculators(directory):
    """The configuration of the same head as speculators 0.9.0 saves it; its tensors have the same names."""
    native = json.loads((directory / "config.json").read_text())
    reads = native.get("dflash_config", native)
    markov = ("markov_rank", "markov_head_type", "enable_confidence_head")
    dspark = {name: native[name] for name in markov if name in native}
    layer = {
        name: native[name]
        for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "vocab_size", "max_position_embeddings", "hidden_act", "rms_norm_eps", "attention_bias",
            "tie_word_embeddings", "rope_parameters", "layer_types", "sliding_window", "use_sliding_window",
        )
    }  # fmt: skip
    kind = "dspark" if native.get("markov_rank") else "dflash"
    values = dspark | {
        "architectures": ["DSparkDraftModel" if kind == "dspark" else "DFlashDraftModel"],
        "auto_map": {"": "config.DFlashSpeculatorConfig"},
        "aux_hidden_state_layer_ids": [layer + 1 for layer in reads["target_layer_ids"]],
        "block_size": native["block_size"],
        "draft_vocab_size": native["draft_vocab_size"],
        "dtype": native["dtype"],
        "mask_token_id": reads["mask_token_id"],
        "sample_from_anchor": reads["sample_from_anchor"],
        "sliding_window_non_causal": native.get("is_causal") is False,
        "speculators_config": {"algorithm": kind, "verifier": {"name_or_path": "x", "architectures": []}},
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": layer
        | {"model_type": "qwen3", "pad_token_id": None, "max_window_layers": 28, "use_cache": True},
        "transformers_version": "5.19.0",
    }
    (directory / "config.json").write_text(json.dumps(values))
    return directory


OF_SPECULATORS = [
    {},
    {"draft_vocab_size": 5},
    {"sample_from_anchor": True},
    DSPARK,
    {"markov_rank": 3, "draft_vocab_size": 5},
    {"causal": True, "sliding": SlidingWindow((0, 1), 7, from_anchor=True)},
    {"causal": False, "sliding": SlidingWindow((0, 1), 7, from_anchor=True)},
    MIXED,
    DSPARK | {"causal": False, "sliding": SlidingWindow((0,), 2, from_anchor=True)},
]


@pytest.mark.parametrize("changes", OF_SPECULATORS)
def test_a_head_of_speculators_is_the_same_head(tmp_path, changes):
    head = block_head(**changes).float()
    directory = to_speculators(saved(tmp_path, **changes))
    for loaded in (load_block_head(directory, head.config.num_target_layers), load_any_head(directory, 5)):
        assert loaded.config == head.config
        assert torch.equal(loaded.target_ids, head.target_ids)
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in head.state_dict().items())


def with_target(directory, **changes):
    save_block_head(block_head(**changes).float(), directory, verifier=Verifier("org/target", ("LlamaForCausalLM",)))
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("changes", OF_SPECULATORS)
def test_a_head_that_knows_its_target_speaks_both_dialects(tmp_path, changes):
    head = block_head(**changes)
    saved(tmp_path / "native", **changes)
    native = json.loads((tmp_path / "native" / "config.json").read_text())
    both = with_target(tmp_path, **changes)
    assert both == both | native
    assert both["speculators_config"]["verifier"]["name_or_path"] == "org/target"
    assert both["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == head.config.drafts
    assert load_any_head(tmp_path).config == head.config
    # What speculators reads of it is what it has saved itself.
    edit_config(to_speculators(tmp_path / "native"), lambda v: v["transformer_layer_config"].pop("max_window_layers"))
    theirs = json.loads((tmp_path / "native" / "config.json").read_text())
    told = ("aux_hidden_state_layer_ids", "block_size", "draft_vocab_size", "mask_token_id", "sample_from_anchor")
    assert {name: both[name] for name in told} == {name: theirs[name] for name in told}
    if head.config.sliding is not None:
        assert both["sliding_window_non_causal"] == theirs["sliding_window_non_causal"]
    layer, theirs = both["transformer_layer_config"], theirs["transformer_layer_config"]
    assert layer == layer | {name: theirs[name] for name in LAYER if name in theirs}


@pytest.mark.parametrize(
    "changes",
    [
        {"causal": True},
        SLIDING,
        {"causal": False, "sliding": SlidingWindow((0, 1), 7)},
        {"causal": True, "sliding": SlidingWindow((1,), 3, from_anchor=True)},
    ],
)
def test_views_that_speculators_cannot_say_are_not_said_in_its_dialect(tmp_path, changes):
    assert not set(with_target(tmp_path, **changes)) & set(OF_SPECULATORS_KEYS)
    assert load_any_head(tmp_path).config == block_head(**changes).config


@pytest.mark.parametrize(
    "edit",
    [
        lambda v: v.update(aux_hidden_state_layer_ids=[1, 2]),
        lambda v: v.update(sliding_window_non_causal=True),
        lambda v: v["transformer_layer_config"].update(intermediate_size=7),
    ],
)
def test_two_dialects_that_describe_two_heads_are_refused(tmp_path, edit):
    with_target(tmp_path, **MIXED)
    edit_config(tmp_path, edit)
    with pytest.raises(GraftError, match="the top level and transformer_layer_config describe different heads"):
        load_block_head(tmp_path)


def test_what_a_head_of_speculators_need_not_say(tmp_path):
    """Its earlier versions knew neither layout nor windows."""
    directory = to_speculators(saved(tmp_path))
    edit_config(directory, lambda v: [v.pop(name) for name in ("sample_from_anchor", "sliding_window_non_causal")])
    edit_config(directory, lambda v: v["transformer_layer_config"].update(model_type="llama", layer_types=None))
    assert load_block_head(directory, 5).config == block_head().config


def of_layer(**changes):
    return lambda values: values["transformer_layer_config"].update(changes)


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        (
            {},
            lambda v: v.update(speculators_model_type="dflash2"),
            "only dflash and dspark can be loaded",
        ),
        ({}, lambda v: v.update(aux_hidden_state_layer_ids=[0, 3]), r"the target's embeddings \(0\) are not read"),
        ({}, lambda v: v.update(aux_hidden_state_layer_ids=[1, 5]), "before the target's last layer, 4"),
        ({}, lambda v: v.update(aux_hidden_state_layer_ids=[3, 1]), "distinct and ascending"),
        ({}, lambda v: v.update(mask_token_id=None), "mask_token_id is missing"),
        ({}, lambda v: v.update(mask_token_id=13), "mask_token_id=13 must be"),
        ({}, lambda v: v.update(target_hidden_size=32), "as wide as their target"),
        ({}, lambda v: v.update(conv_kernel_size=2), "conv_kernel_size=2 is not known"),
        ({}, lambda v: v.pop("transformer_layer_config"), "lacks the key 'transformer_layer_config'"),
        ({}, of_layer(attention_bias=True), "attention_bias=True makes another network"),
        ({}, of_layer(hidden_act="gelu"), "hidden_act='gelu' makes another network"),
        ({}, of_layer(unheard_of=1), "unheard_of=1 is not known"),
        (
            DSPARK,
            lambda v: v.pop("sample_from_anchor"),
            "sample_from_anchor is missing, and speculators",
        ),
        (DSPARK, lambda v: v.update(markov_head_type="rnn"), "markov_head_type='rnn' makes another network"),
        (MIXED, lambda v: v.pop("sliding_window_non_causal"), "sliding_window_non_causal is missing, and speculators"),
        (MIXED, of_layer(sliding_window=None), "needs use_sliding_window=true and a sliding_window"),
    ],
)
def test_what_speculators_makes_otherwise_is_refused_by_its_key(tmp_path, kind, edit, message):
    edit_config(to_speculators(saved(tmp_path, **kind)), edit)
    with pytest.raises(GraftError, match=message):
        load_block_head(tmp_path, 5)


def test_how_deep_its_target_is_follows_from_the_target(tmp_path):
    with pytest.raises(GraftError, match="lacks the key 'num_target_layers'"):
        load_block_head(to_speculators(saved(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({"architectures": ["DFlash2DraftModel"]}, "DFlash2DraftModel is DFlash 2, whose convolutions"),
        ({"speculators_model_type": "dflash2"}, "dflash2 is DFlash 2"),
        ({"speculators_model_type": "xpress"}, "xpress is XPress, whose refiner"),
        ({"architectures": ["XPressDraftModel"], "speculators_model_type": "dflash"}, "XPressDraftModel is XPress"),
        ({"speculators_model_type": "peagle"}, "peagle is P-EAGLE, whose learned state"),
        ({"architectures": ["PeagleLlamaForCausalLM"]}, "PeagleLlamaForCausalLM is P-EAGLE"),
        ({"architectures": ["LiLiCorrDraftModel"]}, "LiLiCorrDraftModel is LiLiCorr"),
        ({"architectures": ["Qwen3NextMTP"]}, "Qwen3NextMTP is multi-token prediction"),
        ({"architectures": ["DominoDraftModel"]}, "DominoDraftModel is Domino, whose recurrent"),
    ],
)
def test_families_that_are_not_computed_are_named_with_the_reason(tmp_path, changes, family):
    edit_config(saved(tmp_path), lambda values: values.update(changes))
    with pytest.raises(GraftError, match=f"{family}.* cannot be computed here: take an EAGLE-3, DFlash or DSpark head"):
        load_any_head(tmp_path, 5)


def test_tensors_and_keys_are_those_of_the_native_dialects(tmp_path):
    dflash, dspark = saved(tmp_path / "a", causal=True, num_hidden_layers=1), saved(tmp_path / "b", **DSPARK)
    assert set(load_file(dflash / "model.safetensors")) == {
        "fc.weight",
        "hidden_norm.weight",
        "norm.weight",
        *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"layers.0.self_attn.{name}_norm.weight" for name in "qk"),
        *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        *(f"layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")),
    }
    markov = load_file(dspark / "model.safetensors")
    assert markov["markov_head.markov_w1.weight"].shape == (13, 3)
    assert markov["markov_head.markov_w2.weight"].shape == (13, 3)
    config = json.loads((dflash / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"]
    assert config["is_causal"] is True
    assert config["layer_types"] == ["full_attention"]
    assert config["dflash_config"]["target_layer_ids"] == [0, 2]
    assert config["dflash_config"]["sample_from_anchor"] is False
    config = json.loads((dspark / "config.json").read_text())
    assert config["architectures"] == ["Qwen3DSparkModel"]
    assert config["sample_from_anchor"] is True
    assert (config["target_layer_ids"], config["mask_token_id"]) == ([0, 2], 12)


def test_weights_are_written_in_the_dtype_asked_for(tmp_path):
    save_block_head(block_head().float(), tmp_path, torch.bfloat16)
    assert load_block_head(tmp_path).fc.weight.dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_published_dflash_head_need_not_say_what_is_the_default(tmp_path):
    def edit(values):
        for name in (
            "is_causal",
            "draft_vocab_size",
            "layer_types",
            "use_sliding_window",
            "sliding_window",
            "head_dim",
        ):
            del values[name]
        del values["dflash_config"]["causal"], values["dflash_config"]["sample_from_anchor"]

    edit_config(saved(tmp_path, head_dim=4), edit)
    assert load_block_head(tmp_path).config == block_head(head_dim=4).config


@pytest.mark.parametrize(
    ("layer_types", "nested", "causal", "layers"),
    [
        (None, {}, False, (0, 1)),
        (["full_attention"] * 2, {}, False, (0, 1)),
        (["full_attention"] * 2, {"causal": True}, True, (0, 1)),
        (["sliding_attention"] * 2, {}, True, (0, 1)),
        (["sliding_attention"] * 2, {"causal": False}, False, (0, 1)),
        (["full_attention", "sliding_attention"], {}, None, (1,)),
        (["full_attention", "sliding_attention"], {"use_swa": False}, None, (1,)),
    ],
)
def test_use_swa_slides_every_layer_where_layer_types_names_none(tmp_path, layer_types, nested, causal, layers):
    """As modelopt and MiMo write it and vLLM resolves it: only where layer_types names it is a window causal."""

    def edit(values):
        del values["is_causal"], values["use_sliding_window"], values["dflash_config"]["causal"]
        values |= {"layer_types": layer_types, "sliding_window": 7}
        values["dflash_config"] |= {"use_swa": True, "swa_window_size": 7} | nested

    edit_config(saved(tmp_path), edit)
    config = load_block_head(tmp_path).config
    assert (config.causal, config.sliding) == (causal, SlidingWindow(layers, 7))


@pytest.mark.parametrize("place", ["dflash_config", "dspark_config"])
def test_specforges_dspark_head_is_the_same_head(tmp_path, place):
    """It nests what DeepSpec has at the top level, and does not say that its slots predict the token behind them."""

    def edit(values):
        values |= {"architectures": ["DSparkDraftModel"], "model_type": "dspark", "tie_word_embeddings": True}
        names = ("markov_rank", "markov_head_type", "enable_confidence_head")
        nested = {name: values.pop(name) for name in ("target_layer_ids", "mask_token_id")}
        values["dflash_config"] = nested | {"projector_type": "dspark", "attention_mode": "gqa"}
        moved = {name: values.pop(name) for name in names}
        values[place] = values.get(place, {}) | moved | {"confidence_head_alpha": 1.0}
        del values["sample_from_anchor"], values["is_causal"], values["draft_vocab_size"]

    edit_config(saved(tmp_path, **DSPARK), edit)
    head = load_any_head(tmp_path)
    assert head.config == block_head(**DSPARK).config
    assert torch.equal(head.markov_head.markov_w2.weight, block_head(**DSPARK).float().markov_head.markov_w2.weight)


def test_a_text_model_of_another_name_has_the_same_layers(tmp_path):
    """Positions of images in RoPE are the same for text."""
    edit_config(saved(tmp_path), lambda v: v.update(model_type="qwen3_vl_text", rope_scaling=None))
    edit_config(tmp_path, lambda v: v["rope_parameters"].update(mrope_section=[1, 1, 1], mrope_interleaved=True))
    assert load_block_head(tmp_path).config == block_head().config


def test_a_head_without_embeddings_of_its_own_may_say_that_the_targets_are_tied(tmp_path):
    edit_config(saved(tmp_path), lambda v: v.update(tie_word_embeddings=True))
    assert load_block_head(tmp_path).config == block_head().config
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"embed_tokens.weight": torch.ones(13, 16)}, path)
    with pytest.raises(GraftError, match="tie_word_embeddings=True, but of its own the head has embeddings alone"):
        load_block_head(tmp_path)
    save_file(load_file(path) | {"lm_head.weight": torch.ones(13, 16)}, path)
    assert load_block_head(tmp_path).lm_head is not None


def test_jetspecs_key_makes_a_head_causal(tmp_path):
    def edit(values):
        del values["is_causal"], values["dflash_config"]["causal"]
        values["dflash_config"]["causal_head"] = True

    edit_config(saved(tmp_path), edit)
    assert load_block_head(tmp_path).config.causal


def test_a_confidence_head_is_left_out_and_that_is_said(tmp_path):
    path = saved(tmp_path, **DSPARK) / "model.safetensors"
    save_file(load_file(path) | {"confidence_head.proj.weight": torch.ones(1, 16)}, path)
    with pytest.warns(UserWarning, match="confidence head is not used"):
        head = load_block_head(tmp_path)
    assert not any("confidence" in name for name in head.state_dict())


def of_dflash(**changes):
    return lambda values: values["dflash_config"].update(changes)


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        (
            {},
            lambda v: v.update(architectures=["DFlash2DraftModel"]),
            "DFlash2DraftModel.*only DFlashDraftModel, Qwen3D",
        ),
        ({}, lambda v: v.update(is_causal=True), "is_causal, dflash_config.causal and .*say different things"),
        ({}, of_dflash(sample_from_anchor=True), "sample_from_anchor=True and DFlashDraftModel"),
        (
            {"sample_from_anchor": True},
            lambda v: v.pop("sample_from_anchor"),
            "sample_from_anchor is missing, and engines differ",
        ),
        ({}, of_dflash(mask_token_id=13), "mask_token_id=13"),
        ({}, of_dflash(target_layer_ids=[0, 4]), "before the target's last layer"),
        ({}, of_dflash(target_layer_ids=None), "target_layer_ids is missing"),
        ({}, of_dflash(block_size=16), r"different things of block_size: \[4, 16\]"),
        ({}, of_dflash(final_logit_softcapping=30.0), "final_logit_softcapping=30.0 is not known"),
        ({}, of_dflash(conv_kernel_size=2), "conv_kernel_size=2 is not known"),
        ({}, of_dflash(use_swa=True), "needs use_sliding_window=true and a sliding_window"),
        ({}, of_dflash(use_swa=1, swa_window_size=7), "use_swa=1 must be true or false"),
        ({}, of_dflash(use_swa=True, swa_window_size=4), "sliding_window=4 must be a whole number from 5"),
        (SLIDING, of_dflash(swa_window_size=8), "sliding_window=7 and swa_window_size=8: engines differ"),
        ({}, of_dflash(attention_sink_bias=True), "attention_sink_bias=True makes another network"),
        ({}, lambda v: v.update(attention_sink_bias=True), "attention_sink_bias=True makes another network"),
        ({}, of_dflash(attention_value_scale=0.612), "attention_value_scale=0.612 makes another network"),
        ({}, lambda v: v.update(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 makes another network"),
        ({}, of_dflash(attention_mode="mla"), "attention_mode='mla' makes another network"),
        ({}, of_dflash(projector_type="dspark"), "projector_type='dspark' and DFlashDraftModel"),
        (DSPARK, lambda v: v.update(dspark_config={"markov_head_type": "rnn"}), "markov_head_type='rnn' makes another"),
        (DSPARK, lambda v: v.update(dspark_config={"markov_rank": 4}), r"different things of markov_rank: \[3, 4\]"),
        (
            DSPARK,
            lambda v: v.update(dspark_config={"block_size": 3}, dflash_config={"block_size": 4}),
            "dflash_config and dspark_config say different things of block_size",
        ),
        ({}, lambda v: v.update(layer_types=["sliding_attention"] * 2), "needs use_sliding_window=true and a"),
        (SLIDING, lambda v: v.update(use_sliding_window=False), "needs use_sliding_window=true and a"),
        (SLIDING, lambda v: v.update(sliding_window=None), "needs use_sliding_window=true and a"),
        (SLIDING, lambda v: v.update(layer_types=None), "sliding_window=7, but not in which layers"),
        (SLIDING, lambda v: v.update(layer_types=["chunked_attention"] * 2), "there must be 2, each full_attention"),
        (SLIDING, lambda v: v.update(layer_types=["sliding_attention"]), "there must be 2, each full_attention"),
        (SLIDING, lambda v: v.update(sliding_window=4), "sliding_window=4 must be a whole number from 5"),
        ({}, lambda v: v.update(num_hidden_layers=2**40), "layer_types"),
        ({}, lambda v: v.update(num_hidden_layers=2**40, layer_types=None), "num_hidden_layers=1099511627776 must be"),
        ({}, lambda v: v.update(is_neox_style=False), "is_neox_style=False makes another network"),
        ({}, lambda v: v.update(model_type="llama"), "only qwen3"),
        ({}, lambda v: v.update(unheard_of=1), "unheard_of=1 is not known"),
        (DSPARK, lambda v: v.update(markov_head_type="gated"), "markov_head_type='gated' makes another network"),
        ({}, lambda v: v.pop("num_target_layers"), "lacks the key 'num_target_layers'"),
        ({}, lambda v: v.update(num_attention_heads="four"), "does not describe a block head"),
        ({}, lambda v: v.update(num_hidden_layers=3, layer_types=None), "missing .*layers.2"),
    ],
)
def test_a_config_that_describes_another_head_is_refused_by_its_key(tmp_path, kind, edit, message):
    edit_config(saved(tmp_path, **kind), edit)
    with pytest.raises(GraftError, match=message):
        load_block_head(tmp_path)


def told_of(directory) -> str:
    """The error of a head that is refused; else where it was loaded from."""
    try:
        load_block_head(directory, 5)
    except GraftError as error:
        return str(error)
    return str(directory)


@pytest.mark.parametrize("junk", [None, True, -1, 2**40, float("nan"), "x", [None], {"rope_type": "dynamic"}])
def test_whatever_a_key_holds_the_head_loads_or_the_error_names_its_file(tmp_path, junk):
    """No value makes something enormous either."""
    for kind, dialect in product(({}, DSPARK, MIXED), (lambda path: path, to_speculators)):
        path = dialect(saved(tmp_path, **kind)) / "config.json"
        values = json.loads(path.read_text())
        for part in [values, *(value for value in values.values() if isinstance(value, dict))]:
            for name, before in list(part.items()):
                part[name] = junk
                path.write_text(json.dumps(values))
                assert str(tmp_path) in told_of(tmp_path), name
                part[name] = before


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update(mask_hidden=torch.ones(16)), "mask_hidden.*not computed here"),
        (lambda t: t.update({"lm_head.weight": torch.ones(12, 16)}), r"another shape \['lm_head.weight'\]"),
        (lambda t: t.update({"embed_tokens.weight": torch.ones(13, 8)}), r"another shape \['embed_tokens.weight'\]"),
        (
            lambda t: t.update({"prefix_gru.weight_ih_l0": torch.ones(1)}),
            "the recurrent pass of Domino is not",
        ),
        (lambda t: t.update({"refiner_head.down_h": torch.ones(1)}), "the refiner of XPress is not computed here"),
        (lambda t: t.update(surplus=torch.ones(1)), r"unknown \['surplus'\]"),
        (lambda t: t.pop("fc.weight"), r"missing \['fc.weight'\]"),
        (lambda t: t.update({"norm.weight": torch.ones(8)}), r"another shape \['norm.weight'\]"),
        (lambda t: t.update({"norm.weight": torch.full((16,), float("nan"))}), "norm.weight holds NaN"),
        (lambda t: t.update({"norm.weight": torch.ones(16, dtype=torch.int32)}), "norm.weight is of torch.int32"),
    ],
)
def test_tensors_of_another_head_are_refused_by_name(tmp_path, edit, message):
    path = saved(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    with pytest.raises(GraftError, match=message):
        load_block_head(tmp_path)


def test_an_embedding_of_the_masks_own_is_refused(tmp_path):
    (saved(tmp_path) / "mask_embedding.pt").write_bytes(b"")
    with pytest.raises(GraftError, match=r"mask_embedding\.pt, an embedding of the mask's own, is not computed here"):
        load_block_head(tmp_path)


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 1}, DSPARK])
def test_who_wants_an_eagle3_head_is_told_that_this_is_none(tmp_path, changes):
    with pytest.raises(GraftError, match=r"drafts blocks \(head\.family=block\): it is no EAGLE-3 head"):
        load_head(saved(tmp_path, **changes))


def test_a_truncated_file_is_named(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(GraftError, match=r"model\.safetensors"):
        load_block_head(tmp_path)
