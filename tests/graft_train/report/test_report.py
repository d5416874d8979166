"""The page has what the run has, and says what it lacks; what is no run is refused in one line."""

import json
import os
import re
import shutil
from html import unescape

import pytest
from click.testing import CliRunner

from graft_inference import METHODS, GraftError
from graft_train.cli import main
from graft_train.report import render, report
from graft_train.run_directory import RunDirectory


@pytest.fixture(autouse=True)
def without_vega(monkeypatch):
    """Its script takes a second to make; test_browser.py has it."""
    monkeypatch.setattr("graft_train.report.javascript_bundle", lambda: "// Vega")


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def sections(run_dir) -> dict[str, str]:
    """The text of each section."""
    page = render(RunDirectory.open(run_dir))
    parts = re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL)
    return {name: " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).split()) for name, text in parts}


def missing(run_dir) -> dict[str, str]:
    """What the sections say that they lack."""
    page = render(RunDirectory.open(run_dir))
    parts = re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL)
    found = {name: re.findall(r'class="missing" role="note">(.*?)</p>', text) for name, text in parts}
    return {name: unescape(texts[0]) for name, texts in found.items() if texts}


def change(path, act):
    values = json.loads(path.read_text())
    act(values)
    path.write_text(json.dumps(values))


def test_a_finished_run_lacks_nothing(finished_run):
    assert missing(finished_run) == {}
    shown = sections(finished_run)
    evaluation = json.loads((finished_run / "evaluation" / "evaluation.json").read_text())
    for method in METHODS:
        found = evaluation["methods"][method]
        assert f"{method} {found['tokens_per_second']:.1f} {found['speedup']:.2f}x" in shown["speed"]
    assert "held-out acceptance length, in the engine 1.60" in shown["training"]
    assert "60 of 61" in shown["corpus"]
    assert "no draft where retrieval promises over 2.25 tokens (8 nodes)" in shown["policy"]
    assert "distill 1.5 min python 3.11" in shown["settings"]
    assert f"evaluation name {evaluation['device']['name']}" in shown["settings"]


def test_plots_hold_the_figures_of_the_files(finished_run):
    page = render(RunDirectory.open(finished_run))
    specs = json.loads(re.search(r'id="plots">(.*?)</script>', page, re.DOTALL).group(1))
    parts = [part for spec in specs for part in (spec, *spec.get("layer", [])) if "data" in part]
    rows = [row for part in parts for row in part["data"]["values"]]
    evaluation = json.loads((finished_run / "evaluation" / "evaluation.json").read_text())
    calibration = json.loads((finished_run / "policy" / "report.json").read_text())
    for name, found in evaluation["methods"].items():
        speeds = [row for row in rows if row.get("method") == name and "low" in row]
        assert [row["speedup"] for row in speeds] == [found["speedup"]]
        verify = [row["ms"] for row in rows if row.get("phase") == "verify" and row["method"] == name]
        assert verify == [found["ms_per_round"]["verify"]]
        stops = {row["checkpoint"]: row["share"] for row in rows if "share" in row and row["method"] == name}
        assert next(iter(stops)) == "none"
        rounds = sum(found["checkpoints"].values())
        assert {stop: share for stop, share in stops.items() if share} == {
            stop: pytest.approx(100 * count / rounds) for stop, count in found["checkpoints"].items()
        }
        tokens = [row["tokens"] for row in rows if row.get("source") == "target" and row["method"] == name]
        assert tokens == [found["accepted_per_round"]["bonus"]]
    curve = calibration["calibration_error"]["drafted"]["curves"]["after"]
    heads = [[row["claimed"], row["met"], row["nodes"]] for row in rows if row.get("proposer") == "head"]
    assert heads[: len(curve)] == curve
    promised, met, nodes = zip(*curve, strict=True)
    gaps = sum(abs(p - m) * n for p, m, n in zip(promised, met, nodes, strict=True)) / sum(nodes)
    assert gaps == pytest.approx(calibration["calibration_error"]["drafted"]["after"])
    lengths = [(row["step"], row["of"], row["length"]) for row in rows if "length" in row]
    assert (10, "training batches, estimated", 1.5) in lengths
    assert (20, "held out, estimated", 1.7) in lengths
    assert (20, "held out, in the engine", 1.6) in lengths


@pytest.mark.parametrize(
    ("stage", "says", "where"),
    [
        ("evaluation", "Evaluation is missing: graft evaluate makes it", {"speed", "acceptance", "time"}),
        ("policy", "Policy is missing: graft calibrate makes it", {"rounds", "policy", "calibration"}),
        ("head", "Head is missing: graft distill makes it", {"training"}),
        ("corpus", "Corpus is missing: graft build_corpus makes it", {"corpus"}),
    ],
)
def test_a_missing_stage_is_named_with_its_command(run, stage, says, where):
    shutil.rmtree(run / stage)
    assert missing(run) == dict.fromkeys(where, says)


def test_a_stage_under_way_is_told_and_its_curves_are_shown(run):
    (run / "head").rename(run / "head.partial")
    with (run / "head.partial" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    assert missing(run) == {
        "training": "Head is not finished: graft distill is at work on it, or was interrupted and goes on from it"
    }
    shown = sections(run)
    assert "Loss by draft step" in shown["training"]
    assert "head.partial" in shown["settings"]


def test_an_adopted_head_has_no_curves(run):
    (run / "head" / "metrics.jsonl").unlink()
    assert "graft adopt took it as it is" in missing(run)["training"]


def test_traces_without_text_leave_out_the_viewer_alone(run):
    (run / "policy" / "texts.json").unlink()
    told = missing(run)
    assert list(told) == ["rounds"]
    assert re.match(r"The traces have no text.*: delete .*policy and run graft calibrate", told["rounds"])
    assert 'id="viewer"' not in render(RunDirectory.open(run))


@pytest.mark.parametrize(
    ("file", "act", "section", "says"),
    [
        ("evaluation/evaluation.json", lambda v: v["methods"].clear(), "speed", "is empty: .* run graft evaluate"),
        (
            "evaluation/evaluation.json",
            lambda v: v["methods"]["graft"].pop("by_context"),
            "acceptance",
            r"another shape \(KeyError\('by_context'\)\), as of another version: run graft evaluate again",
        ),
        (
            "evaluation/evaluation.json",
            lambda v: v["methods"]["graft"].update(tokens_per_second="fast"),
            "speed",
            "another shape .*another version: run graft evaluate again",
        ),
        ("policy/report.json", lambda v: v.pop("frontier"), "policy", "another version: run graft calibrate again"),
        (
            "policy/report.json",
            lambda v: [found.pop("curves") for found in v["calibration_error"].values()],
            "calibration",
            "of a version that kept no curves",
        ),
        ("policy/report.json", lambda v: v.update(calibration_error={}), "calibration", "One traced prompt alone"),
        ("policy/latency.json", lambda v: v.update(more=1), "rounds", "another version: run graft calibrate again"),
        ("policy/latency.json", lambda v: v["verify_ms"][0].pop(), "rounds", r"latency\.json is no table of latencies"),
        ("policy/texts.json", lambda v: v["tokens"].clear(), "rounds", "text of other traces"),
        ("policy/policy.json", lambda v: v.pop("graft"), "rounds", "must hold exactly"),
        ("corpus/inspection.json", lambda v: v.update(recall=3), "corpus", "another version: run graft build_corpus"),
        ("corpus/stage.json", lambda v: v.update(settings=3), "settings", "another version"),
    ],
)  # fmt: skip
def test_files_of_another_version_spoil_their_section_alone(run, file, act, section, says):
    change(run / file, act)
    told = missing(run)
    assert re.search(says, told[section]), told
    stages = {"evaluation": {"speed", "acceptance", "time"}, "policy": {"rounds", "policy", "calibration"}}
    assert set(told) <= stages.get(file.partition("/")[0], {section})


@pytest.mark.parametrize("file", ["evaluation/evaluation.json", "policy/report.json", "head/metrics.jsonl"])
def test_damaged_files_are_named_with_the_remedy(run, file):
    (run / file).write_text("{\n")
    assert any(file.rpartition("/")[2] in text for text in missing(run).values())


def test_damaged_traces_are_named(run):
    (run / "policy" / "traces.safetensors").write_bytes(b"cut")
    assert "traces.safetensors cannot be read" in missing(run)["rounds"]


def test_all_evaluations_are_on_the_page(run):
    shutil.copytree(run / "evaluation", run / "evaluation-math")
    change(run / "evaluation-math" / "evaluation.json", lambda v: v["settings"].update(suite="math"))
    level = {
        "tokens_per_second_in_all": 90.0,
        "tokens_per_second": 45.0,
        "first_token_ms": {"median": 1.0, "p95": 2.0},
        "between_tokens_ms": {"median": 1.0, "p95": 2.0},
        "acceptance_length": None,
    }
    served = {
        "servers": [{"url": "http://localhost:8000/v1", "model": "m"}],
        "levels": [{"concurrency": 8, "servers": [level]}],
        "settings": {"suite": "gsm8k", "path": None},
    }
    shutil.copytree(run / "evaluation", run / "evaluation-server")
    (run / "evaluation-server" / "evaluation.json").write_text(json.dumps(served))
    assert missing(run) == {}
    shown = sections(run)
    assert "Prompts of math" in shown["speed"]
    assert "Prompts of math" in shown["acceptance"]
    assert "localhost:8000 8 90.0" in shown["speed"]
    for directory in ("evaluation", "evaluation-math"):
        shutil.rmtree(run / directory)
    assert "only servers were evaluated" in missing(run)["acceptance"].lower()


def test_the_command_writes_the_page_into_the_run_or_elsewhere(run, tmp_path):
    done = CliRunner().invoke(main, ["report", str(run)])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == str(run / "report.html")
    first = (run / "report.html").read_bytes()
    report(run, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == first, "the same run gives the same page"


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nowhere", "there is no directory"),
        ("empty", "is no run: it has none of data, head, corpus"),
        ("bundle", "is a bundle; name the run directory"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, place, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "graft.json").write_text("{}")
    done = CliRunner().invoke(main, ["report", str(tmp_path / place)])
    assert done.exit_code == 1
    assert says in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.rglob("report.html"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_told(run):
    run.chmod(0o500)
    with pytest.raises(GraftError, match="give this user the right"):
        report(run)


def test_a_directory_that_is_not_there_is_no_place_for_a_page(run, tmp_path):
    with pytest.raises(GraftError, match=r"there is no directory .*nowhere for page\.html: make it first"):
        report(run, tmp_path / "nowhere" / "page.html")
