"""A published head of each family and dialect goes from `adopt` to an evaluated bundle, and nothing is trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from graft_inference import METHODS, GraftEngine, GraftError
from graft_inference import bundle as bundle_module
from graft_inference.heads.block.checkpoint import save_block_head
from graft_inference.heads.block.view import SlidingWindow
from graft_inference.heads.eagle3.checkpoint import save_head
from graft_inference.heads.families import load_any_head
from graft_train.adopt import adopt
from graft_train.build_corpus import build_corpus
from graft_train.calibrate import calibrate
from graft_train.config.head import HeadTrainConfig
from graft_train.data.states import PackedTarget
from graft_train.distill import distill
from graft_train.distill.checkpoint import save_checkpoint
from graft_train.distill.eagle3.strategy import Eagle3Strategy
from graft_train.evaluate import evaluate
from graft_train.export import export
from graft_train.regenerate import regenerate
from graft_train.stage import fingerprint_of
from tests.graft_inference.test_block_checkpoint import to_speculators as block_to_speculators
from tests.graft_inference.test_block_drafter import tiny_block_head
from tests.graft_inference.test_head_checkpoint import to_speculators
from tests.graft_inference.tiny import tiny_head, tiny_model
from tests.graft_inference.tiny_bundle import write_target
from tests.graft_train.tiny_run import tiny_config, write_sources

LAYERS = 4


def eagle3(directory: Path) -> None:
    save_head(tiny_head(tiny_model("llama")), directory)


def eagle3_of_speculators(directory: Path) -> None:
    eagle3(directory)
    to_speculators(directory)


def eagle3_of_a_newer_trainer(directory: Path) -> None:
    """Qwen3's layer, a sliding window, and EAGLE 3.1's norms: parts that speculators' dialect alone has."""
    parts = {"qk_norm": True, "sliding_window": 6, "fc_norm": True, "norm_output": True}
    save_head(tiny_head(tiny_model("llama"), **parts), directory)


def official_eagle3(directory: Path) -> None:
    """A pickle of tensors, which does not say which layers the head reads: 1, n//2 - 1 and n - 4 of its target's n."""
    save_head(tiny_head(tiny_model("llama", num_hidden_layers=8), aux_layer_ids=(1, 3, 4)), directory)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    edit_config(directory, lambda c: [c.pop(name) for name in ("eagle_config", "eagle_aux_hidden_state_layer_ids")])


def dflash(directory: Path) -> None:
    save_block_head(tiny_block_head(tiny_model("llama"), block_size=5), directory)


def dspark(directory: Path) -> None:
    head = tiny_block_head(tiny_model("llama"), block_size=4, sample_from_anchor=True, markov_rank=3)
    save_block_head(head, directory)


def dflash_of_speculators(directory: Path) -> None:
    """As its trainer makes them: all layers have a sliding window and are causal."""
    window = SlidingWindow((0, 1), 6, from_anchor=True)
    save_block_head(tiny_block_head(tiny_model("llama"), block_size=5, causal=True, sliding=window), directory)
    block_to_speculators(directory)


def dspark_of_speculators(directory: Path) -> None:
    dspark(directory)
    block_to_speculators(directory)


PUBLISHED = (
    eagle3,
    eagle3_of_speculators,
    eagle3_of_a_newer_trainer,
    official_eagle3,
    dflash,
    dspark,
    dflash_of_speculators,
    dspark_of_speculators,
)


def edit_config(directory: Path, edit) -> None:
    values = json.loads((directory / "config.json").read_text())
    edit(values)
    (directory / "config.json").write_text(json.dumps(values))


def run_of(directory: Path, head: Path | str | None, layers: int = LAYERS):
    """A run with a target, and nothing else yet."""
    write_sources(directory / "sources")
    config = tiny_config(directory / "run", directory / "sources")
    write_target(directory / "run" / "target", num_hidden_layers=layers)
    config.head.init_from = None if head is None else str(head)
    return config


@pytest.mark.parametrize("publish", PUBLISHED)
def test_a_published_head_becomes_an_evaluated_bundle(tmp_path, publish):
    publish(tmp_path / "published")
    layers = 8 if publish is official_eagle3 else LAYERS
    config = run_of(tmp_path, tmp_path / "published", layers)
    for stage in (adopt, regenerate, build_corpus, calibrate, export, evaluate):
        stage(config)
    run = tmp_path / "run"
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert evaluation["lossless"] == dict.fromkeys(METHODS, True)

    head, before = load_any_head(run / "bundle"), load_any_head(tmp_path / "published", layers)
    assert head.config == before.config
    assert torch.equal(head.target_ids, before.target_ids)
    assert head.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in head.state_dict().items())
    assert type(GraftEngine.from_pretrained(run / "bundle", run / "target").head) is type(before)
    assert sorted(path.name for path in (run / "head").iterdir()) == ["config.json", "model.safetensors", "stage.json"]
    record = json.loads((run / "head" / "stage.json").read_text())
    assert (record["stage"], record["settings"]["init_from"]) == ("adopt", str(tmp_path / "published"))


def write_checkpoint(directory: Path) -> Path:
    """A training's checkpoint of the head that `eagle3` publishes."""
    model = tiny_model("llama")
    head = tiny_head(model)
    strategy = Eagle3Strategy(head, PackedTarget(model, head.config.aux_layer_ids), HeadTrainConfig())
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(strategy)
    save_checkpoint(accelerator, strategy.identity(), directory, 3, keep=1)
    return directory / "step-00000003"


def test_a_checkpoint_of_a_training_becomes_a_bundle(tmp_path):
    """Not the head at the end, which may never come."""
    eagle3(tmp_path / "published")
    config = run_of(tmp_path, write_checkpoint(tmp_path))
    for stage in (adopt, regenerate, build_corpus, calibrate, export):
        stage(config)
    bundled, published = load_file(tmp_path / "run" / "bundle" / "model.safetensors"), tmp_path / "published"
    expected = load_file(published / "model.safetensors")
    assert bundled.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in bundled.items())
    # Another step of the same training is another head.
    record = json.loads((tmp_path / "run" / "head" / "stage.json").read_text())
    weights = tmp_path / "step-00000003" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    assert record["settings"]["files"] != fingerprint_of(weights.parent)


def test_a_checkpoint_is_not_adopted_over_the_training_that_it_lies_in(tmp_path):
    """Whose directory would have to go first, and it with it."""
    checkpoint = write_checkpoint(tmp_path / "run" / "head.partial" / "checkpoints")
    with pytest.raises(
        GraftError, match=r"step-00000003 is of the training in .*head\.partial, .* move the checkpoint"
    ):
        adopt(run_of(tmp_path, checkpoint))
    assert (checkpoint / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "model.safetensors").unlink(), r"step-00000003: .*model\.safetensors is missing"),
        (lambda path: (path / "identity.json").write_text("{}"), r"identity\.json describes no head"),
        (lambda path: (path / "pytorch_model").mkdir(), "step-00000003 is incomplete or damaged"),
    ],
)
def test_a_damaged_checkpoint_is_told_by_its_file(tmp_path, spoil, message):
    checkpoint = write_checkpoint(tmp_path)
    spoil(checkpoint)
    with pytest.raises(GraftError, match=message):
        adopt(run_of(tmp_path, checkpoint))
    assert not (tmp_path / "run" / "head").exists()


def test_a_head_on_the_hub_is_recorded_with_its_commit_and_in_its_dtype(tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / "0c64"
    save_head(tiny_head(tiny_model("llama")).to(torch.bfloat16), snapshot)
    monkeypatch.setattr(bundle_module, "snapshot_download", lambda name, **patterns: str(snapshot))
    head = adopt(run_of(tmp_path, "someone/eagle3"))
    settings = json.loads((head / "stage.json").read_text())["settings"]
    assert (settings["init_from"], settings["commit"]) == ("someone/eagle3", "0c64")
    assert load_any_head(head).fc.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("publish", [eagle3, dspark])
def test_what_a_head_brings_of_its_target_is_left_out_and_what_is_its_own_stays(tmp_path, publish):
    model = tiny_model("llama")
    copies = {"embed_tokens.weight": model.get_input_embeddings().weight}
    if publish is dspark:
        copies["lm_head.weight"] = model.get_output_embeddings().weight
    for own in ("", *copies):  # none, or one of them
        directory = tmp_path / f"of {own}"
        publish(directory / "published")
        path = directory / "published" / "model.safetensors"
        before = load_file(path)
        save_file(before | copies | {name: -copies[name] for name in copies if name == own}, path)
        adopted = load_file(adopt(run_of(directory, directory / "published")) / "model.safetensors")
        assert adopted.keys() - before.keys() == {own} - {""}
        assert all(torch.equal(adopted[name], -copies[name]) for name in adopted.keys() - before.keys())


def test_the_same_head_again_is_reused_and_another_is_refused(tmp_path, capsys):
    dflash(tmp_path / "first")
    eagle3(tmp_path / "second")
    config = run_of(tmp_path, tmp_path / "first")
    before = {path.name: path.read_bytes() for path in adopt(config).iterdir()}
    adopt(config)
    assert "adopt: reusing" in capsys.readouterr().out
    config.head.init_from = str(tmp_path / "second")
    with pytest.raises(GraftError, match=r"head was made with other settings: .*init_from: .*first -> .*second"):
        adopt(config)
    config.head.init_from = str(tmp_path / "first")
    tensors = load_file(tmp_path / "first" / "model.safetensors")
    save_file(tensors | {"fc.weight": tensors["fc.weight"] + 1}, tmp_path / "first" / "model.safetensors")
    with pytest.raises(GraftError, match=r"head was made with other settings: files: "):
        adopt(config)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "head").iterdir()} == before


def test_a_run_has_one_head_trained_or_adopted(tmp_path):
    eagle3(tmp_path / "published")
    config = run_of(tmp_path, tmp_path / "published")
    regenerate(config)
    adopt(config)
    with pytest.raises(GraftError, match=r"head was made with other settings: by graft adopt, not by graft distill"):
        distill(config)
    shutil.rmtree(tmp_path / "run" / "head")
    distill(config)
    with pytest.raises(GraftError, match=r"head was made with other settings: by graft distill, not by graft adopt"):
        adopt(config)


def test_without_a_head_both_ways_to_one_are_named(tmp_path):
    config = run_of(tmp_path, None)
    with pytest.raises(GraftError, match=r"head\.init_from is not set: name the published head"):
        adopt(config)
    regenerate(config)
    build_corpus(config)
    with pytest.raises(GraftError, match=r"head is missing; run graft distill, or graft adopt, with the same run_dir"):
        calibrate(config)


def of_another_width(directory: Path) -> None:
    save_head(tiny_head(tiny_model("llama", hidden_size=16)), directory)


def of_another_vocabulary(directory: Path) -> None:
    save_block_head(tiny_block_head(tiny_model("llama", vocab_size=60), block_size=5), directory)


def of_a_deeper_target(directory: Path) -> None:
    save_head(tiny_head(tiny_model("llama"), aux_layer_ids=(0, 1, 6)), directory)


def of_a_block_heads_deeper_target(directory: Path) -> None:
    save_block_head(tiny_block_head(tiny_model("llama"), block_size=5, num_target_layers=6), directory)


def without_weights(directory: Path) -> None:
    eagle3(directory)
    (directory / "model.safetensors").unlink()


def without_config(directory: Path) -> None:
    eagle3(directory)
    (directory / "config.json").unlink()


def with_a_mask_outside(directory: Path) -> None:
    dflash(directory)
    edit_config(directory, lambda c: c["dflash_config"].update(mask_token_id=61))


def of_a_family_that_is_not_computed(directory: Path) -> None:
    dflash(directory)
    edit_config(directory, lambda c: c.update(architectures=["DFlash2DraftModel"]))


def a_whole_model(directory: Path) -> None:
    write_target(directory)


@pytest.mark.parametrize(
    ("publish", "message"),
    [
        (of_a_family_that_is_not_computed, "published: DFlash2DraftModel is DFlash 2, .* cannot be computed here"),
        (a_whole_model, "published: .*num_hidden_layers=4 makes another network"),
        (of_another_width, "published: the head has hidden_size=16, but the target 32: it is another target's"),
        (of_another_vocabulary, "published: the head has vocab_size=60, but the target 61"),
        (of_a_deeper_target, r"published: the head reads layers \[0, 1, 6\], but the target has 0\.\.3"),
        (of_a_block_heads_deeper_target, "published: the head has num_target_layers=6, but the target 4"),
        (without_weights, r"published: .*model\.safetensors"),
        (without_config, r"there is no model in .*published \(no config.json\)"),
        (with_a_mask_outside, "published: .*mask_token_id=61 must be a whole number from 0 to 60"),
        (lambda directory: None, "head.init_from: .*published is neither a directory nor"),
    ],
)
def test_a_head_that_this_target_cannot_have_is_refused_and_nothing_is_written(tmp_path, publish, message):
    publish(tmp_path / "published")
    with pytest.raises(GraftError, match=message):
        adopt(run_of(tmp_path, tmp_path / "published"))
    assert not (tmp_path / "run" / "head").exists()
    left = tmp_path / "run" / "head.partial"
    assert not left.exists() or [path.name for path in left.iterdir()] == ["stage.json"]
