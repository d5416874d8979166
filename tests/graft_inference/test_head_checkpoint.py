"""The head's checkpoint: round trip, both engines' conventions, strict loading."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft_inference.errors import GraftError
from graft_inference.heads.checkpoint import Verifier
from graft_inference.heads.eagle3.checkpoint import load_head, save_head
from graft_inference.heads.eagle3.dialects import AUX_IDS, SLIDING, newer_than_sglang
from graft_inference.heads.eagle3.model import DraftHead, DraftHeadConfig
from graft_inference.heads.families import described

from .plain_head import COMBINATIONS, varied
from .plain_head import SPECULATORS as SPECULATORS_HEAD


def make_head(**changes) -> DraftHead:
    torch.manual_seed(0)
    values = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 10,
        "draft_vocab_size": 4,
        "aux_layer_ids": (1, 5, 8),
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
        "norm_before_residual": True,
    }
    head = DraftHead(DraftHeadConfig(**(values | changes)))
    if head.config.draft_vocab_size == 4:
        head.set_draft_vocabulary(torch.tensor([0, 3, 4, 9]))
    return head


@pytest.fixture
def saved(tmp_path):
    save_head(make_head(), tmp_path)
    return tmp_path


def edit_tensors(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_config(directory, edit):
    values = json.loads((directory / "config.json").read_text())
    edit(values)
    (directory / "config.json").write_text(json.dumps(values))


def test_round_trip_keeps_config_tensors_and_vocabulary(saved):
    head, loaded = make_head(), load_head(saved)
    assert loaded.config == head.config
    assert loaded.target_ids.tolist() == [0, 3, 4, 9]
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_saving_leaves_other_files_and_no_remains(saved):
    (saved / "graft.json").write_text("{}")
    save_head(make_head(), saved)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "graft.json", "model.safetensors"]


def test_dtype_survives(tmp_path):
    save_head(make_head().to(torch.bfloat16), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert load_head(tmp_path).fc.weight.dtype == torch.bfloat16


def test_d2t_is_an_offset_and_t2d_marks_the_kept_ids(saved):
    tensors = load_file(saved / "model.safetensors")
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    assert tensors["d2t"].tolist() == [0, 2, 2, 6]  # 0+0, 1+2, 2+2, 3+6 = 0, 3, 4, 9
    assert tensors["t2d"].nonzero().flatten().tolist() == [0, 3, 4, 9]


def test_full_vocabulary_has_no_maps(tmp_path):
    save_head(make_head(draft_vocab_size=10), tmp_path)
    assert not {"d2t", "t2d"} & load_file(tmp_path / "model.safetensors").keys()
    assert load_head(tmp_path).target_ids.tolist() == list(range(10))


def test_tensor_names_are_the_official_ones(saved):
    attention = {f"midlayer.self_attn.{name}_proj.weight" for name in "qkvo"}
    mlp = {f"midlayer.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    norms = {f"midlayer.{name}.weight" for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")}
    rest = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    assert load_file(saved / "model.safetensors").keys() == attention | mlp | norms | rest


def test_config_speaks_to_both_engines(saved):
    values = json.loads((saved / "config.json").read_text())
    assert values["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (values["model_type"], values["num_hidden_layers"], values["draft_vocab_size"]) == ("llama", 1, 4)
    assert (values["tie_word_embeddings"], values["norm_before_residual"]) == (False, True)
    assert values["target_hidden_size"] == 16
    # Outputs of layers 1, 5, 8 are the inputs of layers 2, 6, 9.
    assert values["eagle_config"] == {
        "eagle_aux_hidden_state_layer_ids": [1, 5, 8],
        "use_aux_hidden_state": True,
    }
    assert values["eagle_aux_hidden_state_layer_ids"] == [2, 6, 9]
    assert values["rope_theta"] == 500.0
    assert values["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert values["rope_parameters"] == {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}


def test_flat_config_of_an_older_engine_loads(saved):
    def age(values):
        for name in ("rope_parameters", "norm_before_residual", "eagle_aux_hidden_state_layer_ids"):
            del values[name]

    edit_config(saved, age)
    config = load_head(saved).config
    assert config.rope_parameters == {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    assert config.norm_before_residual is False
    assert config.aux_layer_ids == (1, 5, 8)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(GraftError, match=f"{name} is missing.*distill"):
        load_head(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_file_is_named(saved, name, kept):
    content = (saved / name).read_bytes()
    # The last byte of the configuration is its newline, without which it is still whole.
    (saved / name).write_bytes(content[: kept if kept >= 0 else len(content) - 2])
    with pytest.raises(GraftError, match=f"{name}.*distill"):
        load_head(saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("fc.weight"), r"missing \['fc.weight'\]"),
        (lambda t: t.update({"midlayer.extra": torch.zeros(1)}), r"unknown \['midlayer.extra'\]"),
        (lambda t: t.update({"fc.weight": torch.zeros(3, 3)}), r"another shape \['fc.weight'\]"),
        (lambda t: t["t2d"].logical_not_(), "different draft vocabularies"),
        (lambda t: t["d2t"].zero_(), "different draft vocabularies"),
        (lambda t: t.update({"d2t": torch.tensor([0, 3, 4, 9])}), "ascending ids below 10"),
    ],
)
def test_tensors_that_are_not_this_head_are_refused(saved, edit, message):
    edit_tensors(saved, edit)
    with pytest.raises(GraftError, match=f"model.safetensors.*{message}"):
        load_head(saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("hidden_size"), "lacks the key 'hidden_size'"),
        (lambda c: c.update(num_hidden_layers=2), "num_hidden_layers=2 makes another network"),
        (lambda c: c.update(target_hidden_size=32), "as wide as their target"),
        (lambda c: [c.pop(name) for name in ("eagle_config", AUX_IDS)], f"{AUX_IDS} is missing"),
        (lambda c: c.update({"eagle_config": {}, AUX_IDS: [0, 5, 8]}), "reads the target's embeddings"),
        (lambda c: c.update(attention_bias=True), "attention_bias=True makes another network"),
        (lambda c: c.update(speculators_model_type="dflash"), "only eagle3"),
        (lambda c: c.update(eagle_aux_hidden_state_layer_ids=[1, 5, 8]), "plus one"),
        (lambda c: c.update(draft_vocab_size=11), "draft_vocab_size=11"),
    ],
)
def test_configs_that_are_not_this_head_are_refused(saved, edit, message):
    edit_config(saved, edit)
    with pytest.raises(GraftError, match=f"config.json.*{message}"):
        load_head(saved)


SIZE_NAMES = ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"]


@pytest.mark.parametrize("name", [*SIZE_NAMES, "max_position_embeddings", "draft_vocab_size", "head_dim"])
@pytest.mark.parametrize("value", [0, -4, 2.0, "16", [16], {}, True, 10**30, 1_000_000_000])
def test_sizes_are_whole_numbers_that_the_tensors_have(saved, name, value):
    """Nothing is made of a size before the tensors have confirmed it: 10^9 rows of embeddings took 8.6 GB."""
    if name == "max_position_embeddings" and value == 1_000_000_000:
        pytest.skip("no tensor has it, and nothing is made of it")
    edit_config(saved, lambda c: c.update({name: value}))
    with pytest.raises(GraftError, match=r"config\.json|safetensors: .*shape"):
        load_head(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "must be a multiple"),
        ({"head_dim": 31}, "must be even"),
        ({"head_dim": 2**30}, "at most 65536"),
        ({"rms_norm_eps": 2}, "between 0 and 1"),
        ({"rms_norm_eps": "1e-5"}, "between 0 and 1"),
        ({"norm_before_residual": 1}, "true or false"),
        ({"rope_theta": 0.0, "rope_scaling": None, "rope_parameters": None}, "finite|cannot be used"),
        ({"rope_theta": 600.0}, "different things of rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "different things of factor"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0}, "rope_scaling": None}, "cannot be used"),
        ({"rope_parameters": {"rope_type": "unheard of", "rope_theta": 500.0}, "rope_scaling": None}, "cannot be used"),
        ({"rope_parameters": {"rope_type": 3, "rope_theta": 500.0}}, "must be a name"),
        ({"rope_parameters": {"rope_theta": 500.0, "factor": 8.0}, "rope_scaling": None}, "of which type is not said"),
        (
            {"rope_parameters": None, "rope_scaling": {"rope_type": "default", "factor": 8.0}},
            "of which type is not said",
        ),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "type": "yarn"}}, "linear and yarn"),
        ({"rope_parameters": {"rope_theta": 500.0, "wavelength": 3}}, "wavelength=3 is not known"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 500.0}}}, "none for full_attention"),
        ({"eagle_config": {AUX_IDS: "158"}}, "must be a list of layers"),
        ({"eagle_config": {AUX_IDS: [1.0, 5, 8]}}, "must be a list of layers"),
        ({"eagle_config": {AUX_IDS: [1, 5, 8], "use_mtp_layernorm": True}}, "use_mtp_layernorm=True makes another"),
        ({"eagle_config": {AUX_IDS: [1, 5, 8], "use_last_layernorm": False}}, "use_last_layernorm=False makes another"),
        ({"eagle_config": [1, 5, 8]}, "does not describe a draft head"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True makes another"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' makes another"),
        ({"sliding_window": 8}, "sliding_window=8 is ambiguous without layer_types"),
        ({"layer_types": [SLIDING], "sliding_window": None}, "contradicts sliding_window=None"),
        (
            {"layer_types": [SLIDING], "sliding_window": 8, "use_sliding_window": False},
            "contradicts sliding_window=8 and use_sliding_window=False",
        ),
        ({"layer_types": [SLIDING], "sliding_window": 0}, "sliding_window=0 must be a whole number"),
        ({"layer_types": [SLIDING, "full_attention"], "sliding_window": 8}, "makes another network"),
        ({"layer_types": ["chunked_attention"]}, "makes another network"),
        ({"norm_output": "yes"}, "norm_output='yes' must be true or false"),
        ({"norm_before_fc": True, "fc_norm": True}, "a head has one of them"),
        (
            {"norm_before_fc": False, "eagle_config": {AUX_IDS: [1, 5, 8], "norm_before_fc": True}},
            r"different things of norm_before_fc: \[False, True\]",
        ),
        ({"eagle_config": {AUX_IDS: [1, 5, 8], "parallel_draft_step": 4}}, "parallel_draft_step=4 makes another"),
        ({"pard_token": 7}, r"P-EAGLE head \(pard_token\).* not computed here"),
        ({"ptd_token_id": 7}, r"P-EAGLE head \(ptd_token_id\)"),
        ({"mask_token_id": 7}, r"P-EAGLE head \(mask_token_id\)"),
        ({"architectures": ["PEagleDraftModel"]}, r"P-EAGLE head \(PEagleDraftModel\)"),
        ({"speculators_model_type": "peagle"}, r"P-EAGLE head \(peagle\)"),
        ({"use_qk_norm": True}, "use_qk_norm=True is not known here"),
        ({"architectures": ["Eagle3Gemma"], "model_type": "gemma3"}, "model_type='gemma3' makes another layer"),
        (
            {"rope_parameters": {"full_attention": {}}, "layer_types": [SLIDING], "sliding_window": 8},
            f"none for {SLIDING}",
        ),
    ],
)
def test_what_changes_the_pass_is_refused_by_name(saved, changes, message):
    edit_config(saved, lambda c: c.update(changes))
    with pytest.raises(GraftError, match=f"config.json.*({message})"):
        load_head(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 512, "use_sliding_window": False, "max_window_layers": 36},
        {"layer_types": ["full_attention"], "sliding_window": 512},
        {"model_type": "gpt_oss", "num_local_experts": 16, "experts_per_token": 4},
        {"target_model_type": "gemma3_text", "additional_fc": False, "reuse_target_lm_head": True},
        {
            "norm_output": False,
            "fc_norm": False,
            "norm_before_fc": None,
            "logit_scale": 1.0,
            "partial_rotary_factor": 1,
        },
        {"eagle_config": {AUX_IDS: [1, 5, 8], "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True}},
        {"eagle_config": {AUX_IDS: [1, 5, 8], "norm_before_fc": False}, "num_aux_hidden_states": 3},
        {"architectures": ["Eagle3Qwen3vlForCausalLM"], "model_type": "qwen3_vl"},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "mrope_section": [24, 20, 20]},
            "rope_scaling": None,
        },
    ],
)
def test_what_published_heads_say_beside_the_pass_is_taken(saved, changes):
    """Keys of SpecForge's, NVIDIA's and speculators' configurations, and transformers' several ways to write RoPE."""
    edit_config(saved, lambda c: c.update(changes))
    assert load_head(saved).config == make_head().config


@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_positions_of_images_are_one_to_a_text(tmp_path, name):
    head = make_head(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    save_head(head, tmp_path)
    images = {name: "mrope", "mrope_section": [24, 20, 20]}
    edit_config(tmp_path, lambda c: c.update(rope_parameters=None, rope_scaling=images))
    assert load_head(tmp_path).config == head.config


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_are_numbers(saved, value):
    edit_tensors(saved, lambda t: t["midlayer.mlp.up_proj.weight"][3, 3].fill_(value))
    with pytest.raises(GraftError, match=r"model\.safetensors: midlayer\.mlp\.up_proj\.weight holds NaN or infinity"):
        load_head(saved)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.bool, torch.float8_e4m3fn])
def test_weights_are_of_a_dtype_that_a_head_has(saved, dtype):
    edit_tensors(saved, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(dtype)}))
    with pytest.raises(GraftError, match=f"lm_head.weight is of {dtype}"):
        load_head(saved)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.pop("t2d"),
        lambda t: t.update(d2t=t["d2t"].int()),
        lambda t: t.update(t2d=t["t2d"].to(torch.uint8)),
    ],
)
def test_vocabulary_maps_as_others_write_them(saved, edit):
    edit_tensors(saved, edit)
    head = load_head(saved)
    assert (head.target_ids.dtype, head.target_ids.tolist()) == (torch.int64, [0, 3, 4, 9])
    assert (head.d2t.tolist(), head.t2d.nonzero().flatten().tolist()) == ([0, 2, 2, 6], [0, 3, 4, 9])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("d2t"), r"missing \['d2t'\]"),
        (lambda t: t.update(d2t=t["d2t"].float()), "d2t must be of torch.int"),
        (lambda t: t.update(t2d=t["t2d"].float()), "t2d must be of torch.bool"),
        (lambda t: t.update(d2t=t["d2t"].int().fill_(2**31 - 1)), "ascending ids below 10"),
        (lambda t: t.update(d2t=torch.full((4,), 2**63 - 1)), "ascending ids below 10"),
    ],
)
def test_vocabulary_maps_that_are_none_are_refused(saved, edit, message):
    edit_tensors(saved, edit)
    with pytest.raises(GraftError, match=f"model.safetensors: .*{message}"):
        load_head(saved)


def to_speculators(directory, embeddings=None):
    """The same head as vLLM's speculators would have saved it."""
    flat = json.loads((directory / "config.json").read_text())
    own = ("draft_vocab_size", "norm_before_residual", "target_hidden_size", AUX_IDS)
    nested = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.3.0",
        "norm_before_fc": False,
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "x", "architectures": []}},
        **{name: flat[name] for name in own},
        "transformer_layer_config": {
            name: value for name, value in flat.items() if name not in (*own, "eagle_config", "architectures")
        },
    }
    (directory / "config.json").write_text(json.dumps(nested))

    def rename(tensors):
        for name in [name for name in tensors if name.startswith("midlayer.")]:
            tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)
        if embeddings is not None:
            tensors["embed_tokens.weight"] = embeddings

    edit_tensors(directory, rename)


@pytest.mark.parametrize("draft_vocab_size", [4, 10])
def test_a_speculators_head_is_the_same_head(tmp_path, draft_vocab_size):
    head = make_head(draft_vocab_size=draft_vocab_size)
    save_head(head, tmp_path)
    embeddings = torch.rand(10, 16)
    to_speculators(tmp_path, embeddings)
    loaded = load_head(tmp_path)
    assert loaded.config == head.config
    assert torch.equal(loaded.embed_tokens.weight, embeddings)
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded.target_ids, head.target_ids)


def test_without_the_key_engines_disagree_about_the_residual(saved):
    edit_config(saved, lambda c: c.pop("norm_before_residual"))
    assert load_head(saved).config.norm_before_residual is False
    edit_config(saved, lambda c: c.update(norm_before_residual=True))
    to_speculators(saved)
    edit_config(saved, lambda c: c.pop("norm_before_residual"))
    with pytest.raises(GraftError, match="norm_before_residual is missing, for which speculators takes false and vLLM"):
        load_head(saved)


NEWER = ("qk_norm", "sliding_window", "norm_before_fc", "fc_norm", "norm_output")


@pytest.mark.parametrize("changes", COMBINATIONS, ids=lambda changes: "-".join(filter(changes.get, changes)) or "plain")
def test_every_kind_of_head_comes_back_from_the_dialect_that_can_say_it(tmp_path, changes):
    head = varied(make_head(**changes))
    save_head(head, tmp_path)
    loaded = load_head(tmp_path)
    assert loaded.config == head.config
    assert loaded.state_dict().keys() == head.state_dict().keys()
    for name, tensor in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    values, names = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors").keys()
    newer = {name for name in NEWER if changes.get(name)}
    assert set(newer_than_sglang(head.config)) == newer
    assert ("speculators_model_type" in values) == any(name.startswith("layers.0.") for name in names) == bool(newer)
    assert any(name.startswith("midlayer.") for name in names) == (not newer)


def test_a_newer_heads_config_says_what_speculators_and_vllm_read(tmp_path):
    save_head(make_head(**SPECULATORS_HEAD), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert "model_type" not in values  # by which vLLM would take it for another kind of configuration
    assert (values["speculators_model_type"], values["architectures"]) == ("eagle3", ["Eagle3DraftModel"])
    assert [values[name] for name in ("norm_before_residual", "norm_before_fc", "norm_output")] == [True] * 3
    assert (values["fc_norm"], values[AUX_IDS], values["draft_vocab_size"]) == (False, [2, 6, 9], 4)
    layer = values["transformer_layer_config"]
    assert (layer["model_type"], layer["layer_types"], layer["sliding_window"]) == ("qwen3", [SLIDING], 3)
    assert (layer["use_sliding_window"], layer["num_hidden_layers"], layer["vocab_size"]) == (True, 1, 10)
    assert values["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"input_norm.weight", *(f"layers.0.self_attn.{name}_norm.weight" for name in "qk")} <= names
    assert "which SGLang does not read" in described(tmp_path)[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_before_fc": False}, r"unknown \['input_norm.weight'\]"),
        (
            {"norm_before_fc": False, "fc_norm": True},
            r"missing \['fc_norm.0.weight', .* unknown \['input_norm.weight'\]",
        ),
    ],
)
def test_norms_must_be_those_that_the_config_names(tmp_path, changes, message):
    save_head(make_head(**SPECULATORS_HEAD), tmp_path)
    edit_config(tmp_path, lambda c: c.update(changes))
    with pytest.raises(GraftError, match=message):
        load_head(tmp_path)


def test_a_flat_qwen3_head_is_read_as_vllm_reads_it(tmp_path):
    """vLLM's names: the architecture says the layer, and its flags stand at the top level."""
    head = varied(make_head(**SPECULATORS_HEAD, rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    save_head(head, tmp_path)

    def flatten(values):
        layer = values.pop("transformer_layer_config") | {"architectures": ["Eagle3Qwen3ForCausalLM"]}
        for name in ("speculators_model_type", "speculators_version", "speculators_config"):
            del values[name]
        values |= layer | {"rope_parameters": dict.fromkeys((SLIDING, "full_attention"), layer["rope_parameters"])}

    edit_config(tmp_path, flatten)
    assert load_head(tmp_path).config == head.config
    edit_config(tmp_path, lambda c: c.update(architectures=["LlamaForCausalLMEagle3"]))
    with pytest.raises(GraftError, match=r"unknown .*k_norm"):
        load_head(tmp_path)


def test_what_modelopt_writes_is_read(saved):
    """NVIDIA's modelopt 0.47.0: a flat configuration with `layers.0`, d2t without t2d, outputs' ids alone."""
    edit_tensors(saved, lambda t: t.pop("t2d"))
    edit_tensors(saved, lambda t: [t.update({n.replace("midlayer.", "layers.0."): t.pop(n)}) for n in list(t)])

    def rewrite(values):
        for name in ("norm_before_residual", "target_hidden_size", AUX_IDS, "rope_parameters", "dtype"):
            del values[name]
        values["eagle_config"] |= {
            "use_input_layernorm_in_first_layer": True,
            "use_last_layernorm": True,
            "use_mtp_layernorm": False,
            "next_layer_regular": True,
            "parallel_draft_step": 1,
            "parallel_draft_heads_num_layers": 1,
        }
        values |= {"pretraining_tp": 1, "use_cache": True, "initializer_range": 0.02, "attention_dropout": 0.0}

    edit_config(saved, rewrite)
    head, expected = load_head(saved), make_head(norm_before_residual=False)
    assert head.config == expected.config
    assert head.target_ids.tolist() == [0, 3, 4, 9]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(head.state_dict()[name], tensor), name


def test_the_learned_state_of_p_eagle_is_refused(saved):
    edit_tensors(saved, lambda t: t.update(mask_hidden=torch.zeros(1, 48)))
    with pytest.raises(GraftError, match=r"model.safetensors: this is a P-EAGLE head \(mask_hidden\)"):
        load_head(saved)


def test_what_a_head_taps_follows_from_its_target_where_it_does_not_say(saved):
    """Official EAGLE heads name no layers: outputs of 1, n//2 - 1 and n - 4."""
    edit_config(saved, lambda c: [c.pop(name) for name in ("eagle_config", AUX_IDS)])
    assert load_head(saved, target_layers=32).config.aux_layer_ids == (1, 15, 28)
    edit_config(saved, lambda c: c.update({AUX_IDS: [2, 6, 9]}))
    assert load_head(saved, target_layers=32).config.aux_layer_ids == (1, 5, 8)


@pytest.mark.parametrize("speculators", [False, True])
@pytest.mark.parametrize("name", ["verifier_norm.weight", "layers.1.mlp.up_proj.weight", "embed.weight"])
def test_an_unknown_tensor_is_refused_in_both_dialects(saved, speculators, name):
    if speculators:
        to_speculators(saved)
    edit_tensors(saved, lambda t: t.update({name: torch.zeros(1)}))
    with pytest.raises(GraftError, match=rf"unknown \['{name}'\]"):
        load_head(saved)


def test_maps_that_map_nothing_are_accepted_and_others_are_not(tmp_path):
    save_head(make_head(draft_vocab_size=10), tmp_path)
    maps = {"d2t": torch.zeros(10, dtype=torch.long), "t2d": torch.ones(10, dtype=torch.bool)}
    edit_tensors(tmp_path, lambda t: t.update(maps))
    assert load_head(tmp_path).target_ids.tolist() == list(range(10))
    edit_tensors(tmp_path, lambda t: t["d2t"].add_(1))
    with pytest.raises(GraftError, match=r"unknown \['d2t'\]"):
        load_head(tmp_path)


def test_an_official_head_is_a_pickle_of_tensors(saved):
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(tensors, saved / "pytorch_model.bin")
    loaded = load_head(saved)
    assert loaded.target_ids.tolist() == [0, 3, 4, 9]
    for name, tensor in tensors.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


class RunsCode:
    def __reduce__(self):
        return pytest.fail, ("the pickle ran code",)


@pytest.mark.parametrize("content", [{"fc.weight": RunsCode()}, [torch.zeros(1)], {"fc.weight": 3}, b"", b"junk"])
def test_a_pickle_of_anything_else_is_refused_and_runs_no_code(saved, content):
    (saved / "model.safetensors").unlink()
    if isinstance(content, bytes):
        (saved / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, saved / "pytorch_model.bin")
    with pytest.raises(GraftError, match=r"pytorch_model\.bin"):
        load_head(saved)


VERIFIER = Verifier("org/target", ("LlamaForCausalLM",))


@pytest.mark.parametrize("changes", [{}, {"draft_vocab_size": 10}, SPECULATORS_HEAD], ids=["flat", "whole", "newer"])
def test_a_head_that_knows_its_target_speaks_both_dialects(tmp_path, changes):
    """Every key of the one that it had alone stays as it was, and so do the tensors."""
    head = varied(make_head(**changes))
    save_head(head, tmp_path / "alone")
    save_head(head, tmp_path / "both", VERIFIER)
    alone, both = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("alone", "both"))
    if newer_than_sglang(head.config):
        alone["speculators_config"]["verifier"] = both["speculators_config"]["verifier"]
    assert both == both | alone
    assert both["speculators_config"]["verifier"] == {
        "name_or_path": "org/target",
        "architectures": ["LlamaForCausalLM"],
    }
    assert both["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    assert (tmp_path / "both" / "model.safetensors").read_bytes() == (
        tmp_path / "alone" / "model.safetensors"
    ).read_bytes()
    assert load_head(tmp_path / "both").config == head.config
    assert ("does not read" in described(tmp_path / "both")[1]) == (changes is SPECULATORS_HEAD)
    # The nested keys alone are the same head.
    edit_config(tmp_path / "both", lambda c: [c.pop(name, None) for name in ("hidden_size", "eagle_config")])
    assert load_head(tmp_path / "both").config == head.config


@pytest.mark.parametrize("name", ["intermediate_size", "rms_norm_eps", "max_position_embeddings"])
def test_two_dialects_that_describe_two_heads_are_refused(tmp_path, name):
    save_head(make_head(), tmp_path, VERIFIER)
    edit_config(tmp_path, lambda c: c["transformer_layer_config"].update({name: c[name] / 2 if name[0] == "r" else 8}))
    with pytest.raises(GraftError, match=r"config.json: the top level and transformer_layer_config describe different"):
        load_head(tmp_path)
