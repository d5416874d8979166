"""`graft inspect`: what it says is what the bundle holds."""

import hashlib
import json
import shutil

import pytest
from click.testing import CliRunner

from graft_inference import AcceptanceModel, ChainPlan, Checkpoint, QuotaCheckpoint, QuotaPlan, ScoredPlan, SourceModel
from graft_inference.policy.plan import AUTOREGRESSIVE
from graft_inference.template import chain
from graft_train.cli import main
from graft_train.inspect import facts_of, in_words

from ..graft_inference.tiny import tiny_head, tiny_model
from ..graft_inference.tiny_bundle import write_bundle, write_target
from .test_evaluate import run_evaluate, write_run

MATRIX = SourceModel("matrix", chain(2), (1.0, 1.0), ((0.0, 0.0),), (0.0,))
HEAD = ((1.0, 0.0),) * 3


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "bundle").mkdir()
    return write_bundle(tmp_path / "bundle", write_target(tmp_path / "target"))


def test_what_is_inside_is_said(bundle, tmp_path):
    facts = list(facts_of(bundle, "you/tiny"))
    said = dict(facts)
    assert said["bundle"] == "you/tiny"
    fingerprint = json.loads((bundle / "graft.json").read_text())["target"]["tokenizer"]
    assert said["target"] == f"{tmp_path / 'target'}: 4 layers, 32 wide, 61 tokens, tokenizer {fingerprint[:12]}"
    size = sum(parameter.numel() for parameter in tiny_head(tiny_model("llama")).parameters())
    assert said[""] == f"{size:,} parameters in float32, reads layers [0, 1, 3], drafts 40 of 61 tokens"
    assert said["corpus"] == "up to 4 successors of 61 tokens (100% of the vocabulary), counted at 61 places"
    assert said["served by"].startswith("graft serve, graft chat and GraftEngine")
    assert "transformers" not in said
    files = [line for name, line in facts if name == "file"]
    digest = hashlib.sha256((bundle / "model.safetensors").read_bytes()).hexdigest()
    assert any(line.startswith("model.safetensors") and line.endswith(f"sha256 {digest[:12]}") for line in files)
    assert len(files) == 2
    assert said["SGLang"].startswith("not for this head: it does not capture the output of the target's last layer")
    assert said["vLLM"].startswith("heads of this kind run")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (AUTOREGRESSIVE, "makes trees: no draft (1 + 0 drafted + 0 retrieved nodes); asks no source"),
        (
            QuotaPlan((QuotaCheckpoint(1, 0.25, drafted=2), QuotaCheckpoint(3, drafted=5))),
            "makes trees: 1 draft step where the head is at most 0.25 sure (1 + 2 drafted + 0 retrieved nodes), "
            "else 3 draft steps (1 + 5 drafted + 0 retrieved nodes); asks no source",
        ),
        (
            ScoredPlan((Checkpoint(0, 2.5, 3), Checkpoint(2, 0.0, 8)), acceptance=AcceptanceModel(HEAD, (MATRIX,))),
            "makes trees: no draft where retrieval promises over 2.50 tokens (3 nodes), else 2 draft steps (8 nodes); "
            "asks matrix",
        ),
        (ChainPlan((Checkpoint(0),)), "makes chains: no draft (1 node); asks no source"),
    ],
)
def test_a_plan_in_words(plan, words):
    assert in_words(plan) == words


def test_the_runtimes_code_within_serves_transformers(bundle):
    (bundle / "custom_generate").mkdir()
    said = dict(facts_of(bundle, "you/tiny"))
    assert said["transformers"] == 'generate(custom_generate="you/tiny", trust_remote_code=True): the same'


def test_the_command_shows_it_in_one_screen(tmp_path):
    run = write_run(tmp_path / "run")
    run_evaluate(run)
    shutil.copy(run / "evaluation" / "evaluation.json", run / "bundle")
    shown = CliRunner().invoke(main, ["inspect", str(run / "bundle")], env={"COLUMNS": "120"})
    assert shown.exit_code == 0, shown.output
    assert "up to 4 successors" in shown.output
    assert "speed-up" in shown.output
    assert len(shown.output.splitlines()) < 40


def test_names_with_brackets_are_shown_as_they_are(bundle):
    graft = json.loads((bundle / "graft.json").read_text())
    graft["target"]["name_or_path"] = "models/[/bold]tiny"
    (bundle / "graft.json").write_text(json.dumps(graft))
    (bundle / "gone.safetensors").symlink_to(bundle / "nowhere")
    shown = CliRunner().invoke(main, ["inspect", str(bundle)])
    assert shown.exit_code == 0, shown.output
    assert "models/[/bold]tiny" in shown.output


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda bundle: (bundle / "graft.json").unlink(), "it is no bundle, but may be a head"),
        (lambda bundle: (bundle / "model.safetensors").write_bytes(b"cut"), "truncated or corrupt"),
        (lambda bundle: (bundle / "successors.safetensors").unlink(), "successors.safetensors is missing"),
        (lambda bundle: (bundle / "evaluation.json").write_text("{}"), "is no evaluation that graft evaluate wrote"),
    ],
)
def test_what_is_no_bundle_is_refused_in_one_line(bundle, damage, told):
    damage(bundle)
    shown = CliRunner().invoke(main, ["inspect", str(bundle)])
    assert shown.exit_code == 1
    assert told in shown.output
    assert "Traceback" not in shown.output
