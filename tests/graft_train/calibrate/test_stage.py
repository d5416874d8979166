"""The stage on a tiny random pair: what it writes, what it refuses, and renewing the latency table alone."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graft_inference import ChainPlan, GraftEngine, GraftError, Policy, QuotaPlan
from graft_inference.device import warn_if_elsewhere
from graft_inference.heads.eagle3.checkpoint import save_head
from graft_inference.retrieval.sources import SOURCES
from graft_train import calibrate as module
from graft_train.calibrate import calibrate, measure
from graft_train.calibrate.race import ratio
from graft_train.calibrate.standings import Lap, Run
from graft_train.calibrate.timer import RoundTimer
from graft_train.config import Config
from graft_train.config.policy import CalibrateConfig
from graft_train.config.target import TargetConfig
from graft_train.data.samples import Sample, append_samples
from graft_train.device import describe_device
from graft_train.files import write_json
from tests.graft_inference.tiny import VOCAB, learned_policy, tiny_head, tiny_model
from tests.graft_inference.tiny_bundle import tiny_successors, write_target
from tests.graft_train.tiny_run import spread_over_devices

PLANS = ("eagle3", "draft_only", "retrieve_only", "paper", "learned")


def write_run(run_dir: Path) -> Path:
    """A run directory whose stages before calibrate are done."""
    write_target(run_dir / "target")
    save_head(tiny_head(tiny_model("llama")), run_dir / "head")
    for stage in ("data", "corpus"):
        (run_dir / stage).mkdir()
    save_file(tiny_successors(), run_dir / "corpus" / "successors.safetensors")
    generator = torch.Generator().manual_seed(0)
    with (run_dir / "data" / "samples.jsonl").open("wb") as file:
        for index in range(3):
            ids = torch.randint(0, VOCAB, (6,), generator=generator).tolist()
            append_samples(file, [Sample(f"file{index}.py@0", "calibration", ids)])
    for stage in ("target", "head", "data", "corpus"):
        write_json(run_dir / stage / "stage.json", {"fingerprint": stage, "settings": {}, "inputs": {}})
    return run_dir


def config_for(run_dir: Path, **settings) -> Config:
    sizes = {
        "prompts": 3,
        "max_new_tokens": 16,
        "topk": 3,
        "num_steps": 2,
        "num_draft_tokens": [1, 4, 8],
        "retrieval_depth": 2,
        "checkpoints": 1,
        "minutes": 0.001,  # what a choice cannot do without
        "least_rounds": 31,  # of three prompts
    }
    target = TargetConfig(str(run_dir / "target"), dtype="float32", device="cpu")
    return Config(run_dir=str(run_dir), threads=1, target=target, policy=CalibrateConfig(**(sizes | settings)))


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return write_run(tmp_path)


def test_a_target_spread_over_devices_is_traced_and_timed(run_dir, monkeypatch):
    spread = spread_over_devices(monkeypatch)
    config = config_for(run_dir)
    config.target.device_map = "auto"
    policy_dir = calibrate(config)
    assert spread == [True]
    report = json.loads((policy_dir / "report.json").read_text())
    assert set(report["measured"]) == set(PLANS)
    monkeypatch.undo()
    whole = calibrate(config_for(write_run(run_dir / "whole")))
    traces = [load_file(directory / "traces.safetensors") for directory in (policy_dir, whole)]
    assert torch.equal(traces[0]["truth_TD"], traces[1]["truth_TD"])
    assert torch.equal(traces[0]["tokens_TC"], traces[1]["tokens_TC"])


def test_everything_is_learned_measured_and_written(run_dir):
    policy_dir = calibrate(config_for(run_dir))
    report = json.loads((policy_dir / "report.json").read_text())
    assert set(report["measured"]) == set(report["predicted"]) == set(report["frontier"]) == set(PLANS)
    best = max(PLANS, key=lambda name: (report["measured"][name]["left"], report["measured"][name]["weighed"]))
    assert report["graft_is"] == best
    assert report["race"]["fastest"].partition(",")[0] in {best, *(set(PLANS) - set(report["race"]["left"]))}
    assert set(report["predicted_when_chosen"]) == set(PLANS)
    assert all(
        found["tokens_per_second"] != report["predicted_when_chosen"][name]
        for name, found in report["predicted"].items()
    ), "what was timed before the race foretold it"
    policy = Policy.from_dict(json.loads((policy_dir / "policy.json").read_text()))
    assert policy.measured_on["device"]["name"] == describe_device(torch.device("cpu"))["name"]
    assert policy.graft.num_draft_tokens <= 8
    assert (policy_dir / "frontier.png").read_bytes().startswith(b"\x89PNG")
    text = (policy_dir / "report.md").read_text()
    assert all(f"| {name} |" in text for name in PLANS)


def test_a_policy_of_chains_is_learned_from_chains(run_dir):
    policy_dir = calibrate(config_for(run_dir, kind="chain", topk=1, num_draft_tokens=[1, 2, 3, 4]))
    report = json.loads((policy_dir / "report.json").read_text())
    assert set(report["measured"]) == {"eagle3", "retrieve_only", "chain"}
    assert report["graft_is"] == "chain"
    policy = Policy.from_dict(json.loads((policy_dir / "policy.json").read_text()))
    assert isinstance(policy.graft, ChainPlan)
    assert policy.graft.num_draft_tokens <= 4


def write_latency(path: Path, **changes) -> Path:
    """Times of an engine in which a pass of the head takes next to nothing, and one more verified token as much as
    another pass."""
    table = {
        "num_draft_tokens": [1, 2, 3, 4],
        "contexts": [16],
        "verify_ms": [[1.0, 1.01, 1.02, 1.03]],
        "draft_ms": [0.0, 0.01, 0.02],
        "measured_on": {"engine": "another engine, 8 requests at a time", "name": "Abacus"},
    }
    write_json(path, table | changes)
    return path


CHAINS = {"kind": "chain", "topk": 1, "num_draft_tokens": [1, 2, 3, 4]}


def test_a_policy_is_chosen_by_another_engines_latencies(run_dir, tmp_path):
    policy_dir = calibrate(config_for(run_dir, **CHAINS))
    traced = (policy_dir / "traces.safetensors").read_bytes()
    chosen = {}
    for name, changes in {
        "all is cheap": {},
        "tokens are dear": {"verify_ms": [[1.0, 9.0, 18.0, 27.0]]},
    }.items():
        latency = write_latency(tmp_path / "latency.json", **changes)
        assert calibrate(config_for(run_dir, **CHAINS, latency_from=str(latency))) == policy_dir
        policy = Policy.from_dict(json.loads((policy_dir / "policy.json").read_text()))
        chosen[name] = policy.graft
        assert policy.measured_on["device"]["engine"] == "another engine, 8 requests at a time"
        assert json.loads((policy_dir / "latency.json").read_text())["verify_ms"] == (
            changes.get("verify_ms") or [[1.0, 1.01, 1.02, 1.03]]
        )
    assert (policy_dir / "traces.safetensors").read_bytes() == traced
    assert chosen["all is cheap"].num_draft_tokens > 1
    assert chosen["tokens are dear"].num_draft_tokens == 1, "plain decoding"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"num_draft_tokens": [1, 2, 3], "verify_ms": [[1.0, 2.0, 3.0]]},
            "times of 2 verified tokens and 2 draft steps",
        ),
        ({"draft_ms": [0.0, 1.0]}, "1 draft steps, but"),
        ({"verify_ms": [[1.0, 2.0]]}, "a time of every number of nodes for every context"),
        ({"contexts": [16, 32]}, "a time of every number of nodes for every context"),
        ({"contexts": [], "verify_ms": []}, "contexts must be whole numbers that rise"),
        ({"num_draft_tokens": [1, 3, 2, 4]}, "num_draft_tokens must be whole numbers that rise"),
        ({"num_draft_tokens": [2, 3, 4, 5]}, "num_draft_tokens begin with 1"),
        ({"draft_ms": [0.0, "fast", 2.0]}, "numbers that do not fall"),
        ({"draft_ms": [0.0, True, 2.0]}, "numbers that do not fall"),
        ({"draft_ms": [0.0, 2.0, 1.0]}, "numbers that do not fall"),
        ({"draft_ms": [1.0, 2.0, 3.0]}, "draft_ms with 0"),
        ({"verify_ms": [[-1.0, 2.0, 3.0, 4.0]]}, "a pass takes time"),
        ({"build_ms": 0.0}, "no table of latencies"),
        ({"measured_on": None}, "no table of latencies"),
    ],
)
def test_latencies_that_do_not_fit_choose_nothing(run_dir, tmp_path, changes, told):
    policy_dir = calibrate(config_for(run_dir, **CHAINS))
    before = (policy_dir / "policy.json").read_bytes()
    latency = write_latency(tmp_path / "latency.json", **changes)
    with pytest.raises(GraftError, match=told):
        calibrate(config_for(run_dir, **CHAINS, latency_from=str(latency)))
    assert (policy_dir / "policy.json").read_bytes() == before


def test_chains_are_not_learned_from_trees():
    with pytest.raises(GraftError, match=r"policy\.topk=3 must be 1"):
        CalibrateConfig(kind="chain", topk=3)


def test_at_a_temperature_learned_plans_know_the_noise_of_draws_and_published_ones_do_not(run_dir, monkeypatch):
    raced, taught_by_all = {}, module.taught_by_all

    def noted(plans):
        raced.update(plans | taught_by_all(plans))
        return taught_by_all(plans)

    monkeypatch.setattr(module, "taught_by_all", noted)
    directory = calibrate(config_for(run_dir, temperature=0.8))
    told = {name: plan.shares_noise for name, plan in raced.items()}
    assert told == {name: not name.startswith(module.PUBLISHED) for name in raced}
    plain, shared = (load_file(directory / name) for name in ("traces.safetensors", "traces-shared-noise.safetensors"))
    assert torch.equal(plain["truth_TD"], shared["truth_TD"])
    assert not torch.equal(plain["tokens_TC"], shared["tokens_TC"])
    renewed = calibrate(config_for(run_dir, temperature=0.8, latency_only=True))
    assert not Policy.from_dict(json.loads((renewed / "policy.json").read_text())).eagle3.shares_noise


@pytest.mark.parametrize("by_all_is_faster", [True, False])
def test_the_race_decides_which_tokens_teach_the_matrix(run_dir, monkeypatch, by_all_is_faster):
    """Only of plans that look something up: for others it is the same."""
    raced = {}

    def rigged(track, plans, standings, budget):
        raced.update(plans)
        foretold = standings.foretold
        for number in range(3):
            place, runs = number % len(track.prompts), {}
            for name in standings.left:
                speed = 100.0 * (name.startswith("retrieve_only") + 1)
                speed += 10.0 * (name.endswith(module.BY_ALL) == by_all_is_faster)
                # So long for each token of its prompts, whatever its replay says.
                share = foretold[name][place] / foretold[name].sum()
                runs[name] = Run(15, 45 * share / speed, 10)
            standings.add(Lap(place, runs))
        return standings

    # Whatever the device took: looking up costs nothing, so that plans do it.
    timed = RoundTimer.latency
    monkeypatch.setattr(
        RoundTimer, "latency", lambda timer: replace(timed(timer), source_ms=dict.fromkeys(SOURCES, 0.0))
    )
    monkeypatch.setattr(module, "race", rigged)
    directory = calibrate(config_for(run_dir))
    by_all = {name for name in raced if name.endswith(module.BY_ALL)}
    assert "retrieve_only" + module.BY_ALL in by_all
    for name in by_all:
        plan = raced[name.removesuffix(module.BY_ALL)]
        assert "matrix" in plan.sources
        assert raced[name] == replace(plan, learns_accepted=False)
    policy = Policy.from_dict(json.loads((directory / "policy.json").read_text()))
    report = json.loads((directory / "report.json").read_text())
    assert policy.graft == policy.retrieve
    assert policy.graft.learns_accepted == (not by_all_is_faster)
    assert set(report["measured"]) == set(PLANS)
    assert report["measured"]["retrieve_only"]["tokens_per_second"] == pytest.approx(210.0)
    # What the replay foretold is held against the form that it replayed.
    expected = 200.0 if by_all_is_faster else 210.0
    assert report["measured_as_predicted"]["retrieve_only"] == pytest.approx(expected)
    assert ("taught by all nodes)" in (directory / "report.md").read_text()) == by_all_is_faster


def test_an_interrupted_run_does_not_trace_again(run_dir, monkeypatch):
    monkeypatch.setattr(measure, "RoundTimer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        calibrate(config_for(run_dir))
    monkeypatch.undo()
    monkeypatch.setattr(measure, "record_traces", lambda *_: pytest.fail("traced again"))
    assert (calibrate(config_for(run_dir)) / "policy.json").exists()


def test_an_interrupted_run_traces_the_same_prompts_with_the_noise_told(run_dir, monkeypatch):
    """However much time is left by then: plans of both kinds are compared over the same text."""
    settings = {"temperature": 0.8, "least_rounds": 20}
    record_traces = measure.record_traces

    def interrupted(*given):
        shares_noise = given[3]
        if shares_noise:
            raise KeyboardInterrupt
        return record_traces(*given)

    monkeypatch.setattr(measure, "record_traces", interrupted)
    monkeypatch.setattr(measure, "affordable", lambda *_: 20)
    with pytest.raises(KeyboardInterrupt):
        calibrate(config_for(run_dir, **settings))
    monkeypatch.setattr(measure, "record_traces", record_traces)
    monkeypatch.setattr(measure, "affordable", lambda *_: pytest.fail("asked again"))
    directory = calibrate(config_for(run_dir, **settings))
    plain, shared = (load_file(directory / name) for name in ("traces.safetensors", "traces-shared-noise.safetensors"))
    assert torch.equal(plain["truth_TD"], shared["truth_TD"])
    assert plain["prompt_T"].unique().tolist() == [0, 1]
    assert json.loads((directory / "report.json").read_text())["prompts"] == 2


def test_latency_alone_is_measured_again_without_traces_or_race(run_dir, monkeypatch):
    directory = calibrate(config_for(run_dir))
    before = json.loads((directory / "latency.json").read_text())
    monkeypatch.setattr(measure, "record_traces", lambda *_: pytest.fail("it traced"))
    monkeypatch.setattr(module, "race", lambda *_: pytest.fail("it raced"))
    assert calibrate(config_for(run_dir, latency_only=True)) == directory
    assert json.loads((directory / "latency.json").read_text()) != before
    Policy.from_dict(json.loads((directory / "policy.json").read_text()))


def test_latencies_are_those_of_the_temperature(run_dir, monkeypatch):
    """Drawing costs more than taking the likeliest token: what is timed draws, from seeds that can be drawn again."""
    config = config_for(run_dir, temperature=0.7)
    engine, prompts = module._engine(config), module._prompts(config)
    traces = {False: measure.record_traces(engine, prompts, config.policy)}
    stream, asked = engine.stream, []

    def recorded(prompt, tokens, temperature, **options):
        asked.append((temperature, options["seed"]))
        return stream(prompt, tokens, temperature, **options)

    monkeypatch.setattr(engine, "stream", recorded)
    timer = module.timer_of(config.policy, engine, prompts, traces)
    timer.timed(("short", ("nodes", 4)), 2)
    assert {temperature for temperature, _ in asked} == {0.7}
    assert [asked[0], asked[-1]] == [(0.7, 0), (0.7, 2)]


def test_prompts_that_end_at_once_time_nothing(run_dir):
    config = config_for(run_dir)
    engine, prompts = module._engine(config), module._prompts(config)
    traces = {False: measure.record_traces(engine, prompts, config.policy)}
    engine.eos_token_ids = frozenset(range(engine.target.config.vocab_size))
    with pytest.raises(GraftError, match="ended with their first token"):
        module.timer_of(config.policy, engine, prompts, traces).latency()


def test_latency_alone_needs_traces_of_these_weights(run_dir):
    with pytest.raises(GraftError, match=r"traces\.safetensors is missing: .*without latency_only"):
        calibrate(config_for(run_dir, latency_only=True))
    calibrate(config_for(run_dir))
    write_json(run_dir / "head" / "stage.json", {"fingerprint": "other", "settings": {}, "inputs": {}})
    with pytest.raises(GraftError, match=r"traced with another head \(head, now other\)"):
        calibrate(config_for(run_dir, latency_only=True))


def test_latency_alone_needs_traces_of_these_settings_and_another_dtype_is_another_policy(run_dir):
    calibrate(config_for(run_dir))
    for name, value in {"num_steps": 3, "topk": 2, "retrieval_depth": 3, "temperature": 0.5}.items():
        with pytest.raises(GraftError, match=rf"traced with another policy\.{name}"):
            calibrate(config_for(run_dir, latency_only=True, **{name: value}))
    config = config_for(run_dir)
    config.target.dtype = "bfloat16"
    with pytest.raises(GraftError, match=r"dtype: float32 -> bfloat16"):
        calibrate(config)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_race_goes_over_the_traced_texts(run_dir, temperature):
    """So that a prediction is of the same rounds, and differs in their time alone."""
    report = json.loads((calibrate(config_for(run_dir, temperature=temperature)) / "report.json").read_text())
    compared = 0
    for name, found in report["measured"].items():
        if report["measured_as_predicted"][name] == found["tokens_per_second"] and name != "paper":
            assert found["acceptance_length"] == pytest.approx(report["predicted"][name]["acceptance_length"]), name
            compared += 1
    assert compared >= 2


def test_widths_that_no_tree_has_are_left_out_and_others_are_timed(run_dir):
    """Eight rank paths of depth 1 beside 2 + 2 * 4 drafted nodes."""
    config = config_for(run_dir, retrieval_depth=1, topk=2, num_steps=3, num_draft_tokens=[1, 4, 12, 64])
    latency = json.loads((calibrate(config) / "latency.json").read_text())
    assert latency["num_draft_tokens"] == [1, 4, 12]


@pytest.mark.parametrize("kind", ["paper", "draft_only", "retrieve_only"])
def test_a_kind_decides_what_graft_is(run_dir, kind):
    directory = calibrate(config_for(run_dir, kind=kind))
    policy = Policy.from_dict(json.loads((directory / "policy.json").read_text()))
    assert policy.measured_on["graft_is"] == kind
    assert isinstance(policy.graft, QuotaPlan) == (kind == "paper")
    if kind != "paper":
        assert bool(policy.graft.sources) == (kind == "retrieve_only")
        assert policy.graft.drafts == (kind == "draft_only")


def test_prompts_without_room_are_told_before_anything_runs(run_dir, monkeypatch):
    monkeypatch.setattr(GraftEngine, "generate", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(GraftError, match=r"policy\.max_new_tokens=256 after the \d+ tokens of prompt .* 256 positions"):
        calibrate(config_for(run_dir, max_new_tokens=256))


def test_too_few_rounds_are_told_before_anything_runs(run_dir, monkeypatch):
    monkeypatch.setattr(GraftEngine, "generate", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(GraftError, match="45 traced positions are too few to learn a policy, which takes 500: raise"):
        calibrate(config_for(run_dir, least_rounds=500))
    assert not (run_dir / "policy").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "best"}, "policy.kind=best is unknown"),
        ({"num_draft_tokens": [1]}, "one of them at least 2"),
        ({"minutes": 0.0}, r"policy\.minutes=0\.0 must be finite and more than 0"),
        ({"minutes": float("nan")}, r"policy\.minutes=nan must be"),
        ({"minutes": float("inf")}, r"policy\.minutes=inf must be"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(GraftError, match=message):
        CalibrateConfig(**settings)


def test_another_device_is_warned_of_with_the_remedy():
    policy = learned_policy()
    device = torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_elsewhere(policy, device)
        policy.measured_on["device"] = describe_device(device)
        warn_if_elsewhere(policy, device)
    policy.measured_on["device"] = {"name": "Pocket Calculator", "threads": torch.get_num_threads()}
    with pytest.warns(UserWarning, match=r"calibrated for name Pocket Calculator, not .*policy.latency_only=true"):
        warn_if_elsewhere(policy, device)


def test_a_ratio_and_its_interval_by_hand():
    """Twice the speed on one prompt, four times on the other, the same tokens: 20 / 6 over 20 / 16 in all."""
    ours = {"tokens": [10.0, 10.0], "seconds": [4.0, 2.0]}
    theirs = {"tokens": [10.0, 10.0], "seconds": [8.0, 8.0]}
    assert ratio(ours, theirs) == pytest.approx((16 / 6, 2.0, 4.0))
