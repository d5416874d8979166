"""The stage: what it writes, resuming to the bit, exact gradient accumulation, and bad input."""

import json
import resource
import shutil
import signal
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from graft_inference import GraftEngine, GraftError, QuotaCheckpoint, QuotaPlan
from graft_inference import bundle as bundle_module
from graft_inference.heads.eagle3.checkpoint import load_head, save_head
from graft_inference.policy.policy import Policy
from graft_inference.retrieval.successor_matrix import SuccessorMatrix
from graft_inference.target.model import Target
from graft_train import distill as stage_module
from graft_train.config import Config
from graft_train.config.block import BlockHeadTrainConfig
from graft_train.config.export import ExportConfig
from graft_train.config.head import HeadTrainConfig
from graft_train.config.target import TargetConfig
from graft_train.data import target as target_module
from graft_train.data.chat import spans
from graft_train.data.samples import answered, append_samples
from graft_train.data.states import PackedTarget
from graft_train.data.target import load_target
from graft_train.distill import distill, loop
from graft_train.distill import estimate as estimate_module
from graft_train.distill.batches import collate, hold_out, to_tensors
from graft_train.distill.checkpoint import resume_checkpoint, save_checkpoint
from graft_train.distill.eagle3.layout import make_layout
from graft_train.distill.eagle3.loss import reference_loss
from graft_train.distill.eagle3.strategy import Eagle3Strategy
from graft_train.distill.loop import start_training, train_step
from graft_train.distill.measure import measure_acceptance
from graft_train.distill.metrics import StepMetrics
from graft_train.distill.optimizer import learning_rate, make_optimizers
from graft_train.distill.progress import Progress
from graft_train.distill.state_source import online_states
from tests.graft_inference.plain_head import VARIANTS, varied

from .pair import VOCAB, plain_unroll, samples, tiny_head, tiny_target

SETTINGS = {
    "draft_vocab_size": 8,
    "ttt_steps": 3,
    "epochs": 4,
    "batch_tokens": 40,
    "batches_per_step": 2,
    "learning_rate": 3e-3,
    "mixed_precision": "no",
    "checkpoint_every": 3,
    "keep_checkpoints": 1,
    "log_every": 1,
    "trackers": [],
}


def make_run(directory: Path, dtype: str = "float32", repo_id: str | None = None, **changes) -> Config:
    """A run directory with a target and samples, as the earlier stages leave it."""
    run_dir, target = directory / "run", directory / "tiny"
    if not run_dir.exists():
        tiny_target().save_pretrained(target)
        (run_dir / "data").mkdir(parents=True)
        (run_dir / "data" / "stage.json").write_text(json.dumps({"fingerprint": "hand-made"}))
        with (run_dir / "data" / "samples.jsonl").open("wb") as file:
            append_samples(file, samples(30))
    return Config(
        run_dir=str(run_dir),
        target=TargetConfig(name_or_path=str(target), dtype=dtype, device="cpu"),
        head=HeadTrainConfig(**(SETTINGS | changes | {"block": BlockHeadTrainConfig(**changes.get("block", {}))})),
        export=ExportConfig(repo_id=repo_id),
    )


def metrics(head: Path) -> list[dict]:
    lines = [json.loads(line) for line in (head / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def test_a_run_writes_a_head_that_learned(tmp_path):
    directory = distill(make_run(tmp_path, epochs=20))
    head = load_head(directory)
    assert head.config.aux_layer_ids == (0, 2, 3)
    assert head.config.draft_vocab_size == len(head.target_ids) == 8
    assert max(head.target_ids) < VOCAB // 3  # the answers' tokens
    curve = metrics(directory)
    assert [line["step"] for line in curve] == list(range(1, len(curve) + 1))
    assert sum(sum(line["loss"]) for line in curve[-5:]) < 0.9 * sum(sum(line["loss"]) for line in curve[:5])
    summary = json.loads((directory / "training.json").read_text())
    assert summary["validation_samples"] == 3
    assert summary["validation"]["acceptance_length"] >= 1
    assert summary["coverage"] < 1
    assert {path.name for path in directory.iterdir()} == {
        "config.json",
        "model.safetensors",
        "metrics.jsonl",
        "training.json",
        "stage.json",
    }


@pytest.mark.parametrize("taps", [[1], [0, 1, 2, 3]])
def test_any_number_of_states_may_be_tapped(tmp_path, taps):
    directory = distill(make_run(tmp_path, aux_layer_ids=taps, measure_prompts=2, measure_tokens=8))
    head = load_head(directory)
    assert head.config.aux_layer_ids == tuple(taps)
    assert head.fc.in_features == len(taps) * head.config.hidden_size
    assert (
        json.loads((directory / "training.json").read_text())["measured_acceptance_length"] >= 1
    )  # the engine serves it


def distill_until_killed(config, killed_after, monkeypatch):
    """Interrupts the training before the step after `killed_after`."""
    steps = 0

    def dying(*arguments):
        nonlocal steps
        if steps == killed_after:
            raise KeyboardInterrupt
        steps += 1
        return train_step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_step", dying)
        distill(config)


@pytest.mark.parametrize(("killed_after", "states"), [(2, "online"), (4, "disk"), (8, "memory")])
def test_killed_and_run_again_equals_no_interruption(tmp_path, monkeypatch, killed_after, states):
    whole = distill(make_run(tmp_path / "whole", states=states))
    config = make_run(tmp_path / "killed", states=states)
    distill_until_killed(config, killed_after, monkeypatch)
    partial = Path(config.run_dir) / "head.partial"
    assert not (Path(config.run_dir) / "head").exists()
    kept = killed_after // 3 * 3  # checkpoints come every third step
    saved = [path.name for path in (partial / "checkpoints").glob("*")]
    assert saved == ([f"step-{kept:08d}"] if kept else [])

    counted = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", lambda *arguments: counted.append(1) or train_step(*arguments))
        resumed = distill(config)
    assert metrics(resumed) == metrics(whole)
    assert len(counted) == len(metrics(whole)) - kept
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(load_file(resumed / "model.safetensors")[name], tensor), name


def test_a_torn_checkpoint_is_not_resumed_from(tmp_path):
    config = make_run(tmp_path)
    torn = Path(config.run_dir) / "head.partial" / "checkpoints" / "step-00000003.partial"
    torn.mkdir(parents=True)
    (torn / "model.safetensors").write_bytes(b"half")
    (Path(config.run_dir) / "head.partial" / "stage.json").unlink(missing_ok=True)
    with pytest.raises(GraftError, match="not made by a stage"):
        distill(config)
    training = start()
    assert resume_checkpoint(training.accelerator, training.strategy.identity(), torn.parent, "auto") == 0
    assert not torn.exists()


def strategy(head=None, **changes):
    target = PackedTarget(tiny_target(), (0, 2, 3))
    return Eagle3Strategy(head or tiny_head(), target, HeadTrainConfig(**(SETTINGS | changes)))


def start(**changes):
    trained = strategy(**changes)
    source, tensors = online_states(trained.target), to_tensors(samples(), 64, VOCAB)
    return start_training(Accelerator(cpu=True), trained, source, tensors, trained.settings)


def accumulate(batches: list[list[int]], clip: float = 1e9, head=None) -> tuple[dict[str, torch.Tensor], object]:
    """The gradients of one optimizer step over these batches."""
    training = start(clip=clip, head=head)
    gradients: dict[str, torch.Tensor] = {}

    def keep(*unused):
        gradients.update({name: p.grad.clone() for name, p in training.strategy.head.named_parameters()})

    training.optimizers[0].optimizer.register_step_pre_hook(keep)
    sums, _ = train_step(training, dict(enumerate(batches)), 1e-3)
    return gradients, sums


def test_accumulated_batches_of_unequal_counts_equal_one_batch():
    whole, whole_sums = accumulate([[0, 1, 2, 3, 4]])
    parts_gradients, parts_sums = accumulate([[0], [1, 2, 3], [4]])
    assert parts_sums.trained_K.tolist() == whole_sums.trained_K.tolist()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts_gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("changes", [VARIANTS["plain"], VARIANTS["speculators"]], ids=["plain", "speculators"])
def test_a_steps_gradient_is_that_of_the_definition(changes):
    """Step k weighs 0.8^k over the drafts trained at step k in the whole optimizer step, and no other's count."""
    gradients, sums = accumulate([[0, 1, 2], [3, 4]], head=varied(tiny_head(**changes)))
    trained = strategy(varied(tiny_head(**changes)))
    head, target = trained.head, trained.target
    batch = collate(to_tensors(samples(), 64, VOCAB), [0, 1, 2, 3, 4], torch.device("cpu"))
    states, kept_V = online_states(target)(batch), torch.zeros(VOCAB, dtype=torch.bool)
    kept_V[head.target_ids] = True
    loss_mask_S, layout = batch.loss_mask_S, make_layout(batch.lengths, batch.loss_mask_S)
    answers = [range(*span) for span in spans(loss_mask_S.int().tolist())]
    # Draft k at t foresees token t + 2 + k, all of it in one answer; the target's choice is read one before.
    foreseen = [[s for answer in answers for s in answer if s > answer[0] + step] for step in range(3)]
    counts = [sum(bool(kept_V[states.choice_S[s - 1]]) for s in places) for places in foreseen]
    assert 0 < counts[2] < counts[1] < counts[0] < len(foreseen[0])
    assert sums.trained_K.tolist() == counts
    outputs = plain_unroll(head, target.embed(batch.tokens_S), states.aux_SE, layout, 3)
    logits_SV = states.final_SH @ target.lm_head_VH.T
    weights = [0.8**step / counts[step] for step in range(3)]
    reference_loss(head, outputs, logits_SV, layout, loss_mask_S, weights).backward()
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_a_step_is_taken_at_the_rate_it_is_given():
    """AdamW's first step moves every weight that has a gradient by the rate."""
    for rate in (0.0, 1e-3):
        training = start()
        before = training.strategy.head.fc.weight.detach().clone()
        train_step(training, {0: [0, 1, 2]}, rate)
        moved = (training.strategy.head.fc.weight - before).abs()
        assert moved.median().item() == pytest.approx(rate, rel=0.02)


def test_gradients_of_a_whole_step_are_clipped_together():
    whole, clipped = accumulate([[0, 1], [2]])[0], accumulate([[0, 1], [2]], clip=1e-3)[0]
    norm = torch.stack([gradient.norm() for gradient in whole.values()]).norm()
    assert norm > 1e-2
    for name, gradient in whole.items():
        torch.testing.assert_close(clipped[name], gradient * 1e-3 / norm, atol=1e-7, rtol=2e-3, msg=name)


def test_a_batch_of_answers_of_one_token_adds_nothing(monkeypatch):
    """Nor does a step of nothing else, after which every weight is as it was."""
    rows = to_tensors([answered("mute", [1, 2], [3], {}), *samples()], 64, VOCAB)
    monkeypatch.setitem(globals(), "to_tensors", lambda *unused: rows)
    expected, sums = accumulate([[1, 2]])
    got, got_sums = accumulate([[0], [1, 2]])
    assert got_sums.metrics() == sums.metrics()
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name
    training = start()
    before = {name: parameter.clone() for name, parameter in training.strategy.head.named_parameters()}
    sums, tokens = train_step(training, {0: [0], 1: [0]}, 1e-3)
    assert tokens == 2
    assert sums.metrics() == StepMetrics(
        loss=[0] * 3, acceptance=[0] * 3, conditional_acceptance=[0] * 3, acceptance_length=1
    )
    assert all(torch.equal(parameter, before[name]) for name, parameter in training.strategy.head.named_parameters())


def test_learning_rate_warms_up_and_falls_to_zero():
    settings = HeadTrainConfig(learning_rate=1.0, warmup_share=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1)
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001
    assert sorted(rates[10:], reverse=True) == rates[10:]


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000])
def test_a_checkpoint_without_its_identity_is_told(tmp_path, content):
    accelerator, identity = Accelerator(cpu=True), {"family": "eagle3"}
    save_checkpoint(accelerator, identity, tmp_path, 3, keep=2)
    (tmp_path / "step-00000003" / "identity.json").write_text(content)
    with pytest.raises(GraftError, match="step-00000003 is no checkpoint of a head"):
        resume_checkpoint(accelerator, identity, tmp_path, "auto")


@pytest.mark.parametrize("line", ["{}", "[1]", "3", '{"step": "x"}', "[" * 100_000])
def test_damaged_metrics_are_told(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
    progress = Progress(Accelerator(cpu=True), HeadTrainConfig(trackers=[]), tmp_path)
    with pytest.raises(GraftError, match=r"metrics\.jsonl is damaged"):
        progress.begin(3, 9)


def test_resume_never_starts_again(tmp_path):
    training = start()
    accelerator, identity = training.accelerator, training.strategy.identity()
    save_checkpoint(accelerator, identity, tmp_path, 3, keep=2)
    assert resume_checkpoint(accelerator, identity, tmp_path, "auto") == 3
    assert resume_checkpoint(accelerator, identity, tmp_path, "never") == 0


def test_bf16_trains(tmp_path):
    curve = metrics(distill(make_run(tmp_path, mixed_precision="bf16", epochs=20)))
    assert sum(curve[-1]["loss"]) < 0.95 * sum(curve[0]["loss"])


def test_wandb_is_offline_and_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    directory = distill(make_run(tmp_path, trackers=["wandb"], max_steps=2))
    run_id = (directory / "wandb_id").read_text()
    assert [path.name for path in (directory / "wandb").glob(f"offline-run-*-{run_id}")]


def test_a_resumed_training_goes_on_in_its_wandb_run(tmp_path, monkeypatch):
    import wandb  # here, since the tests of a bare GPU machine import this module

    begun = mock.Mock(wraps=wandb.init)
    monkeypatch.setattr(wandb, "init", begun)
    config = make_run(tmp_path, trackers=["wandb"], max_steps=4, checkpoint_every=2)
    with monkeypatch.context() as patch:
        patch.setattr("graft_train.distill.validate", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            distill(config)
    distill(config)
    first, second = (call.kwargs for call in begun.call_args_list)
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"


@pytest.mark.parametrize("broken", ["start", "log", "finish"])
def test_a_tracker_that_fails_loses_no_training(tmp_path, monkeypatch, capsys, broken):
    plain = distill(make_run(tmp_path / "plain", max_steps=4, log_every=1))
    monkeypatch.setattr(f"accelerate.tracking.WandBTracker.{broken}", mock.Mock(side_effect=OSError("no connection")))
    tracked = distill(make_run(tmp_path / "tracked", trackers=["wandb"], max_steps=4, log_every=1))
    assert (tracked / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert [line["loss"] for line in metrics(tracked)] == [line["loss"] for line in metrics(plain)]
    assert capsys.readouterr().out.count("goes on without wandb, which failed: OSError no connection") == 1


def test_trackers_are_sent_every_logged_step_and_the_settings(tmp_path, monkeypatch):
    sent = mock.Mock()
    monkeypatch.setattr("accelerate.tracking.WandBTracker.log", lambda _, values, step: sent(step, values))
    directory = distill(make_run(tmp_path, trackers=["wandb"], max_steps=3, log_every=1))
    calls = {call.args[0]: call.args[1] for call in sent.call_args_list if "acceptance_length" in call.args[1]}
    assert sorted(calls) == [1, 2, 3]
    for line in metrics(directory):
        if "acceptance_length" in line:
            assert calls[line["step"]]["acceptance_length"] == line["acceptance_length"]
            assert calls[line["step"]]["loss/0"] == line["loss"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ttt_steps": 0}, "head.ttt_steps=0"),
        ({"learning_rate": -1.0}, "head.learning_rate=-1.0"),
        ({"mixed_precision": "fp16"}, "head.mixed_precision=fp16"),
        ({"resume": "yes"}, "head.resume=yes"),
        ({"max_length": 2}, "head.max_length=2"),
        ({"loss": "kl"}, "head.loss=kl must be one of forward_kl"),
        ({"states": "cache"}, "head.states=cache"),
        ({"warmup_share": 1.5}, "head.warmup_share=1.5 is a share"),
        ({"decay_share": -0.1}, "head.decay_share=-0.1 is a share"),
        ({"aux_layer_ids": []}, r"head.aux_layer_ids=\[\]"),
        ({"states_dtype": "bfloat16"}, "head.states_dtype=bfloat16 is for head.states=disk"),
        ({"step_weights": [1.0]}, r"head.step_weights=\[1.0\] must be head.ttt_steps=7 weights"),
        ({"feature_noise": -0.1}, "head.feature_noise=-0.1"),
        ({"validation_samples": -1}, "head.validation_samples=-1"),
        ({"states_top_k": 0, "states": "disk"}, "head.states_top_k=0 must be positive"),
        ({"states_top_k": 8}, "head.states_top_k=8 is for head.states=disk"),
        ({"states_top_k": 8, "states": "disk", "loss": "reverse_kl"}, "head.loss=reverse_kl is infinite"),
        ({"states_top_k": 8, "states": "disk", "skip_out_of_vocabulary": False}, "skip_out_of_vocabulary=true"),
    ],
)
def test_impossible_settings_are_named(changes, message):
    with pytest.raises(GraftError, match=message):
        HeadTrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aux_layer_ids": [0, 2, 9]}, r"head.aux_layer_ids=\[0, 2, 9\].*layers 0\.\.3"),
        ({"aux_layer_ids": [2, 0, 3]}, "ascending"),
        ({"max_length": 3}, "raise head.max_length"),
        ({"batches_per_step": 500}, "lower head.batch_tokens or head.batches_per_step"),
    ],
)
def test_heads_that_cannot_be_trained_are_refused_and_nothing_is_left(tmp_path, changes, message):
    config = make_run(tmp_path, **changes)
    with pytest.raises(GraftError, match=message):
        distill(config)
    assert not (Path(config.run_dir) / "head").exists()


def test_samples_longer_than_the_target_are_refused_before_it_is_loaded(tmp_path):
    config = make_run(tmp_path)
    tiny_target(max_position_embeddings=8).save_pretrained(config.target.name_or_path)
    (Path(config.target.name_or_path) / "model.safetensors").unlink()
    with pytest.raises(GraftError, match=r"longest sample has 12 tokens, and the target 8 .* set head.max_length=8"):
        distill(config)


def test_a_target_without_all_of_its_weights_is_refused(tmp_path):
    config = make_run(tmp_path)
    weights = Path(config.target.name_or_path) / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if name != "lm_head.weight"}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(GraftError, match=r"lacks the tensors \['lm_head.weight'\]"):
        distill(config)


def test_what_fails_after_a_step_finds_it_saved(tmp_path, monkeypatch):
    """On the way, and after the last step: then it is only measured again."""
    whole = distill(make_run(tmp_path / "whole", measure_every=3, measure_tokens=6))
    config = make_run(tmp_path / "failing", measure_every=3, measure_tokens=6)
    partial, steps = Path(config.run_dir) / "head.partial" / "checkpoints", len(load_curve(whole))
    for calls, expected in ((0, 3), (steps // 3 - 1, steps)):
        measured = []

        def failing(*arguments, calls=calls, measured=measured):
            if len(measured) == calls:
                raise RuntimeError("measuring failed")
            measured.append(1)
            return measure_acceptance(*arguments)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="measuring failed"):
            patch.setattr(stage_module, "measure_acceptance", failing)
            distill(config)
        assert [path.name for path in partial.iterdir()] == [f"step-{expected:08d}"]
    monkeypatch.setattr(loop, "train_step", None)
    assert equal_files(distill(config) / "model.safetensors", whole / "model.safetensors")


def load_curve(directory):
    return [line for line in metrics(directory) if "loss" in line]


def equal_files(first, second):
    return first.read_bytes() == second.read_bytes()


def test_data_of_another_target_is_refused(tmp_path):
    config = make_run(tmp_path)
    tiny_target(vocab_size=9).save_pretrained(config.target.name_or_path)
    with pytest.raises(GraftError, match="regenerated with another target"):
        distill(config)


def test_a_checkpoint_of_another_head_is_refused(tmp_path):
    training = start()
    save_checkpoint(training.accelerator, training.strategy.identity(), tmp_path, 3, keep=2)
    other = strategy(tiny_head(list(range(1, VOCAB, 2)) + [VOCAB - 1]))
    with pytest.raises(GraftError, match="belongs to another head: its draft_vocabulary"):
        resume_checkpoint(training.accelerator, other.identity(), tmp_path, "auto")


def test_what_cannot_be_saved_is_said_and_the_last_checkpoint_stays(tmp_path):
    """The kernel refuses files beyond a size, as it would on a full disk."""
    training = start()
    accelerator, identity = training.accelerator, training.strategy.identity()
    save_checkpoint(accelerator, identity, tmp_path, 3, keep=2)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(GraftError, match=r"cannot save .*step-00000006.*step-00000003 is intact"):
            save_checkpoint(accelerator, identity, tmp_path, 6, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    assert resume_checkpoint(accelerator, identity, tmp_path, "auto") == 3


@pytest.mark.parametrize("where", ["train_step", "states", "measure_acceptance"])
def test_running_out_of_memory_names_what_to_lower(tmp_path, monkeypatch, where):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    owner = {"train_step": loop, "states": PackedTarget, "measure_acceptance": stage_module}[where]
    monkeypatch.setattr(owner, where, full)
    with pytest.raises(GraftError, match=r"head.batch_tokens=40.*lower head.batch_tokens"):
        distill(make_run(tmp_path, states="disk", measure_tokens=6))


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(loop, "train_step", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        distill(make_run(tmp_path))


def test_online_and_offline_states_train_to_the_same_losses(tmp_path):
    curves = {
        states: metrics(distill(make_run(tmp_path / states, states=states))) for states in ("online", "disk", "memory")
    }
    for states in ("disk", "memory"):
        for one, two in zip(curves["online"], curves[states], strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_states_of_another_tokenizer_are_refused(tmp_path):
    config = make_run(tmp_path, states="disk", max_steps=1)
    tokenizer = Path(config.target.name_or_path) / "tokenizer.json"
    tokenizer.write_text("{}")
    shutil.rmtree(distill(config))
    tokenizer.write_text("{} ")
    with pytest.raises(GraftError, match=r"states in .* are stale \(target: .*delete"):
        distill(config)


def test_all_logits_on_disk_train_to_the_losses_of_the_final_states(tmp_path):
    exact = metrics(distill(make_run(tmp_path / "exact")))
    stored = metrics(distill(make_run(tmp_path / "stored", states="disk", states_top_k=VOCAB)))
    cut = metrics(distill(make_run(tmp_path / "cut", states="disk", states_top_k=2)))
    for one, two, three in zip(exact, stored, cut, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert three["loss"] != pytest.approx(one["loss"], rel=1e-2)


@pytest.mark.parametrize("states", ["online", "disk"])
def test_a_target_spread_by_a_device_map_trains_the_same(tmp_path, monkeypatch, states):
    """Here there is one device to spread over, and the disk: what is there has no weights between its calls."""
    plain = distill(make_run(tmp_path / "plain", max_steps=3, measure_tokens=6))
    config = make_run(tmp_path / "spread", max_steps=3, states=states, measure_tokens=6)
    config.target.device_map = "auto"
    offloaded = {"model.layers.1": "disk", "model.layers.3": "disk", "lm_head": "disk"}
    kept = ("model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "model.rotary_emb")
    places = offloaded | dict.fromkeys(kept, "cpu")
    load = target_module.AutoModelForCausalLM.from_pretrained

    def split(path, device_map, **settings):
        assert device_map == "auto"
        return load(path, device_map=places, offload_folder=str(tmp_path / "offloaded"), **settings)

    monkeypatch.setattr(target_module.AutoModelForCausalLM, "from_pretrained", split)
    assert metrics(distill(config)) == metrics(plain)
    assert load_target(config.target).get_output_embeddings().weight.is_meta


def test_a_trained_head_can_be_gone_on_from(tmp_path):
    """It starts where the first one stopped, with its draft vocabulary, though the settings name another."""
    first = distill(make_run(tmp_path, epochs=20))
    second = make_run(tmp_path / "again", init_from=str(first), draft_vocab_size=5, learning_rate=1e-6)
    head = load_head(distill(second))
    assert torch.equal(head.target_ids, load_head(first).target_ids)
    assert sum(metrics(Path(second.run_dir) / "head")[0]["loss"]) < 0.9 * sum(metrics(first)[0]["loss"])


def test_an_official_head_on_the_hub_is_gone_on_from(tmp_path, monkeypatch):
    """Its weights are a pickle of tensors, which the download must not leave out."""
    first = distill(make_run(tmp_path, max_steps=2))
    official = tmp_path / "snapshot"
    official.mkdir()
    shutil.copy(first / "config.json", official)
    torch.save(load_file(first / "model.safetensors"), official / "pytorch_model.bin")

    def download(name, **patterns):
        wanted = {name: kept for name, kept in patterns.items() if name.endswith("_patterns")}
        chosen = filter_repo_objects(["config.json", "pytorch_model.bin"], **wanted)
        return str(shutil.copytree(official, tmp_path / "cached", ignore=lambda _, names: set(names) - set(chosen)))

    monkeypatch.setattr(bundle_module, "snapshot_download", download)
    again = distill(make_run(tmp_path / "again", init_from="someone/eagle3", max_steps=1))
    assert torch.equal(load_head(again).target_ids, load_head(first).target_ids)


def test_a_head_with_a_copy_of_the_targets_embeddings_is_gone_on_from_without_it(tmp_path):
    """Published heads of some dialects bring one, and need not say which layers they tap."""
    first = distill(make_run(tmp_path, max_steps=2))
    weights, embeddings = load_file(first / "model.safetensors"), tiny_target().get_input_embeddings().weight
    brought = tmp_path / "brought"
    shutil.copytree(first, brought)
    values = json.loads((brought / "config.json").read_text())
    for name in ("eagle_aux_hidden_state_layer_ids", "eagle_config"):
        del values[name]
    (brought / "config.json").write_text(json.dumps(values))
    changes = {"max_steps": 2, "measure_prompts": 1, "measure_tokens": 4}
    save_file(weights | {"embed_tokens.weight": embeddings}, brought / "model.safetensors")
    plain = distill(make_run(tmp_path / "plain", init_from=str(first), **changes))
    assert metrics(distill(make_run(tmp_path / "with", init_from=str(brought), **changes))) == metrics(plain)
    save_file(weights | {"embed_tokens.weight": embeddings + 1}, brought / "model.safetensors")
    with pytest.raises(GraftError, match="embed_tokens of its own"):
        distill(make_run(tmp_path / "other", init_from=str(brought), **changes))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("changes", [VARIANTS["speculators"], VARIANTS["EAGLE 3.1"]], ids=["speculators", "EAGLE 3.1"])
def test_a_head_of_a_newer_trainer_is_gone_on_from(tmp_path, changes, precision):
    """It keeps its shape and learns; the engine that measures it reads what was written."""
    published = varied(tiny_head(list(range(0, VOCAB, 3)), **changes))
    save_head(published, tmp_path / "published")
    weights = load_file(tmp_path / "published" / "model.safetensors")
    weights["embed_tokens.weight"] = tiny_target().get_input_embeddings().weight.detach()
    save_file(weights, tmp_path / "published" / "model.safetensors")
    settings = {"epochs": 20, "mixed_precision": precision, "measure_prompts": 2, "measure_tokens": 8}
    out = distill(make_run(tmp_path, init_from=str(tmp_path / "published"), **settings))
    trained = load_head(out)
    assert trained.config == published.config
    assert torch.equal(trained.target_ids, published.target_ids)
    assert not any(torch.equal(a, b) for a, b in zip(trained.parameters(), published.parameters(), strict=True))
    curve = metrics(out)
    assert sum(curve[-1]["loss"]) < 0.9 * sum(curve[0]["loss"])
    assert json.loads((out / "training.json").read_text())["measured_acceptance_length"] >= 1


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path, monkeypatch):
    run = PackedTarget.states

    def overflowing(*arguments):
        states = run(*arguments)
        states.aux_SE[0, 0] = float("inf")
        return states

    monkeypatch.setattr(PackedTarget, "states", overflowing)
    with pytest.raises(GraftError, match="batches 0 to 1 is not finite"):
        distill(make_run(tmp_path))
    with pytest.raises(GraftError, match=r"states of shard-00000 are not finite in float16.*states_dtype=bfloat16"):
        distill(make_run(tmp_path / "disk", states="disk", states_dtype="float16"))


def test_states_that_memory_does_not_hold_are_refused_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: mock.Mock(available=1000))
    with pytest.raises(GraftError, match=r"GiB of memory.*set head.states=disk or online"):
        distill(make_run(tmp_path, states="memory"))


def test_a_head_that_was_finished_but_for_its_name_is_not_trained_again(tmp_path, monkeypatch):
    config = make_run(tmp_path, max_steps=4, keep_checkpoints=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("graft_train.stage.remove", mock.Mock(side_effect=KeyboardInterrupt))
        distill(config)
    assert (tmp_path / "run" / "head.partial" / "checkpoints").exists()
    monkeypatch.setattr(stage_module, "_build", None)
    head = distill(config)
    assert load_head(head)
    assert not (head / "checkpoints").exists()


def test_a_head_of_another_target_is_not_gone_on_from(tmp_path):
    first = distill(make_run(tmp_path, max_steps=1))
    config = make_run(tmp_path / "again", init_from=str(first))
    tiny_target(hidden_size=8).save_pretrained(config.target.name_or_path)
    with pytest.raises(GraftError, match=r"head.init_from=.*hidden_size=16, but the target 8"):
        distill(config)
    with pytest.raises(GraftError, match=r"head.init_from: nobody/nothing is neither a directory nor"):
        distill(make_run(tmp_path / "third", init_from="nobody/nothing"))


@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"loss": "total_variation"}, {"feature_noise": 0.2}])
def test_options_of_the_training_learn(tmp_path, changes):
    curve = metrics(distill(make_run(tmp_path, epochs=20, **changes)))
    assert sum(curve[-1]["loss"]) < 0.97 * sum(curve[0]["loss"])


def test_noise_follows_the_batch_and_is_bounded():
    aux_SE = torch.randn(50, 8)
    noise = loop.noisy(aux_SE, 0.1, 7) - aux_SE
    assert torch.equal(noise, loop.noisy(aux_SE, 0.1, 7) - aux_SE)
    assert not torch.equal(noise, loop.noisy(aux_SE, 0.1, 8) - aux_SE)
    share = noise.abs() / aux_SE.square().mean(-1, keepdim=True).sqrt()
    assert 0.09 < share.max() <= 0.1001


def test_muon_takes_the_matrices_within_and_adamw_the_rest():
    muon, adamw = make_optimizers(tiny_head(), HeadTrainConfig(optimizer="muon"))
    head = dict(tiny_head().named_parameters())
    assert sum(len(group["params"]) for group in muon.param_groups) == len(
        [name for name, p in head.items() if p.dim() == 2 and name != "lm_head.weight"]
    )
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(head) - 8


def test_the_acceptance_length_is_measured_in_the_engine_that_serves(tmp_path):
    """On the way and at the end; it is the engine's own acceptance length for the saved head."""
    config = make_run(tmp_path, measure_every=3, measure_tokens=6, measure_prompts=2, epochs=4)
    directory = distill(config)
    steps = len(load_curve(directory))
    measured = [line["step"] for line in metrics(directory) if "measured_acceptance_length" in line]
    assert measured == list(range(3, steps + 1, 3))
    rows = to_tensors(samples(30), 64, VOCAB)
    order, _ = hold_out(samples(30), 3, seed=0)
    chain = QuotaPlan((QuotaCheckpoint(steps=3, drafted=3),), topk=1)
    target = Target(tiny_target(), (0, 2, 3))
    engine = GraftEngine(target, Policy(chain, chain, chain), load_head(directory), SuccessorMatrix(torch.zeros(1, 1)))
    stats = [engine.generate(rows[row].tokens_S[~rows[row].loss_mask_S], 6, method="eagle3").stats for row in order[:2]]
    expected = sum(one.emitted - 1 for one in stats) / sum(one.rounds for one in stats)
    assert json.loads((directory / "training.json").read_text())["measured_acceptance_length"] == pytest.approx(
        expected
    )


@pytest.mark.parametrize(
    ("schedule", "middle", "late"), [("linear", 0.5, 0.1), ("wsd", 1.0, 0.5), ("cosine", 0.5, 0.0245)]
)
def test_schedules(schedule, middle, late):
    settings = HeadTrainConfig(learning_rate=1.0, warmup_share=0.0001, schedule=schedule, decay_share=0.2)
    rates = [learning_rate(step, 1001, settings) for step in range(1001)]
    assert rates[501] == pytest.approx(middle, abs=0.002)
    assert rates[901] == pytest.approx(late, abs=0.002)


def test_what_it_takes_is_told_before_the_first_step(tmp_path, capsys):
    distill(make_run(tmp_path, max_steps=1))
    said = capsys.readouterr().out
    assert "0 % padding" in said
    assert "GiB of" in said
    assert "hours for 1 steps" in said


def test_a_training_that_cannot_fit_says_what_to_lower(monkeypatch):
    monkeypatch.setattr(estimate_module, "memory_of", lambda device: 2**20)
    trained = strategy(batch_tokens=4096, mixed_precision="bf16")
    estimated = estimate_module.estimate_training(trained, trained.settings, 2, 0.5)
    assert estimated.states == 2 * 4096 * 4 * 16 * 2  # batches, tokens, three taps and the final state, width, bf16
    line = estimate_module.describe(estimated, torch.device("cpu"), 1e9, 10)
    assert "may not fit: lower head.batch_tokens" in line
