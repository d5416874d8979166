"""The comparison of the methods: fair arithmetic, and a losslessness check that can fail."""

import json
import re
import shutil
import weakref
from itertools import count
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import graft_train.evaluate as evaluate_module
from graft_inference import METHODS, GenerationStats, GraftEngine, GraftError
from graft_inference.decode import round as round_module
from graft_inference.policy.fallback import MEASURED
from graft_inference.stats import PhaseClock
from graft_train.config import Config
from graft_train.config.target import TargetConfig
from graft_train.data.documents import read_documents
from graft_train.data.samples import Sample, append_samples, read_samples
from graft_train.evaluate import EvaluateConfig, Run, evaluate, lossless, timing
from graft_train.evaluate.prompts import asked_of, directory_of
from graft_train.evaluate.server_passes import Server
from graft_train.evaluate.summary import plain_variation, repetition, summarize
from graft_train.files import write_json
from graft_train.tables import print_table

from ..graft_inference.tiny import VOCAB
from ..graft_inference.tiny_bundle import write_bundle, write_target
from .tiny_run import spread_over_devices

PHASES = ("draft", "graft", "verify", "commit")


def write_run(run_dir: Path, prompt_lengths: tuple[int, ...] = (5, 9, 7)) -> Path:
    """A run directory whose stages before evaluate are done."""
    target = write_target(run_dir / "target")
    write_bundle(run_dir / "bundle", target)
    (run_dir / "data").mkdir()
    generator = torch.Generator().manual_seed(0)
    with (run_dir / "data" / "samples.jsonl").open("wb") as file:
        for index, length in enumerate(prompt_lengths):
            ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
            append_samples(file, [Sample(f"file{index}.py@0", "evaluation", ids)])
    for stage in ("target", "data", "bundle"):
        record = {"fingerprint": stage, "settings": {"license": "apache-2.0"}, "inputs": {}}
        write_json(run_dir / stage / "stage.json", record)
    return run_dir


def config_for(run_dir: Path, **settings) -> Config:
    settings = {"prompts": 3, "max_new_tokens": 16, "repeats": 2, "fallback": False} | settings
    return Config(
        run_dir=str(run_dir),
        target=TargetConfig(str(run_dir / "target"), dtype="float32", device="cpu"),
        evaluation=EvaluateConfig(**settings),
    )


def run_evaluate(run_dir: Path, **settings) -> dict:
    return json.loads((evaluate(config_for(run_dir, **settings)) / "evaluation.json").read_text())


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return write_run(tmp_path)


def test_everything_is_measured_and_written(run_dir, capsys):
    evaluation = run_evaluate(run_dir)
    assert set(evaluation["methods"]) == set(METHODS)
    assert evaluation["lossless"] == dict.fromkeys(METHODS, True)
    assert evaluation["divergences"] == {}
    assert {"name", "threads", "torch", "transformers"} <= evaluation["device"].keys()
    for found in evaluation["methods"].values():
        assert set(found["ms_per_round"]) == set(PHASES)
        round_ms = sum(found["ms_per_round"].values())
        assert found["tokens_per_second"] == pytest.approx(1e3 * found["acceptance_length"] / round_ms)
        assert sum(found["accepted_per_round"].values()) == pytest.approx(found["acceptance_length"])
        assert found["speedup_interval"][0] <= found["speedup"] <= found["speedup_interval"][1]
        assert found["same_tokens_as_autoregressive"] == 1
        assert 0 <= found["time_outside_phases"] < 1
    baseline = evaluation["methods"]["autoregressive"]
    assert baseline["acceptance_length"] == baseline["speedup"] == 1
    assert baseline["checkpoints"] == {"none": 3 * 15}
    assert evaluation["methods"]["graft"]["accepted_per_round"]["matrix"] > 0
    assert {"matrix": 0, "lookup": 0}.items() <= evaluation["methods"]["eagle3"]["accepted_per_round"].items()

    report = (run_dir / "evaluation" / "report.md").read_text()
    card = (run_dir / "bundle" / "README.md").read_text()
    terminal = capsys.readouterr().out
    for method in METHODS:
        speed = f"{evaluation['methods'][method]['tokens_per_second']:.1f}"
        for text in (report, card, terminal):
            assert any(method in line and speed in line for line in text.splitlines())
    assert json.loads((run_dir / "bundle" / "evaluation.json").read_text()) == evaluation
    assert "calibrated plan is that of" not in report
    assert (run_dir / "evaluation" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_fallback_chose_is_told(run_dir, capsys, monkeypatch):
    """In a world where every round takes equally long, the first rounds are timed plain and the rest pay."""
    ticks = count()
    monkeypatch.setattr(PhaseClock, "now", lambda clock: float(next(ticks)))
    evaluation = run_evaluate(run_dir, fallback=True)
    found = evaluation["methods"]["graft"]
    assert set(found["fallback"]) == {"plan"}, "the warm-up left nothing to be measured"
    assert sum(found["fallback"].values()) == sum(found["checkpoints"].values())
    assert all(not method["fallback"] for name, method in evaluation["methods"].items() if name != "graft")
    assert "by what its fallback chose: plan 100.0%" in (run_dir / "evaluation" / "report.md").read_text()
    assert "its plan did not pay" not in capsys.readouterr().out
    found["fallback"] = {"plan": 60, "narrowed": 20, "autoregressive, nothing else pays": 15, MEASURED: 5}
    print_table(evaluation)
    assert "in 35.0% of graft's rounds its plan did not pay" in capsys.readouterr().out


def test_a_second_call_measures_nothing_and_prints_the_table_again(run_dir, capsys, monkeypatch):
    run_evaluate(run_dir)
    first = capsys.readouterr().out
    monkeypatch.setattr(GraftEngine, "generate", lambda *_, **__: pytest.fail("measured again"))
    run_evaluate(run_dir)
    second = capsys.readouterr().out
    assert "evaluate: reusing" in second
    rows = [line for line in first.splitlines() if line.lstrip().startswith(METHODS)]
    assert len(rows) == len(METHODS)
    assert all(row in second for row in rows)


def test_what_was_timed_outlives_a_check_that_does_not_fit(run_dir, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB.")

    with monkeypatch.context() as patch, pytest.raises(GraftError, match=r"evaluation.check_lossless=false.*are kept"):
        patch.setattr(lossless, "_references", full)
        run_evaluate(run_dir)
    timed = json.loads((run_dir / "evaluation.partial" / "timed.json").read_text())
    monkeypatch.setattr(timing, "interleaved", lambda *_: pytest.fail("timed again"))
    evaluation = run_evaluate(run_dir)
    assert evaluation["lossless"] == dict.fromkeys(METHODS, True)
    first = timed["runs"]["graft"][0][0]
    assert sum(first["stats"]["checkpoints"].values()) == first["stats"]["rounds"]
    assert evaluation["methods"]["graft"]["checkpoints"].keys() >= first["stats"]["checkpoints"].keys()
    assert not (run_dir / "evaluation" / "timed.json").exists()


def test_without_the_check_nothing_is_called_lossless(run_dir, capsys):
    evaluation = run_evaluate(run_dir, check_lossless=False)
    assert evaluation["lossless"] == dict.fromkeys(METHODS)
    report, card = ((run_dir / path).read_text() for path in ("evaluation/report.md", "bundle/README.md"))
    assert report.count("not checked") == card.count("not checked") + 1 == len(METHODS) + 1
    assert "no graphs" in report
    capsys.readouterr()
    assert run_evaluate(run_dir) == evaluation
    assert "check_lossless=false; delete" in capsys.readouterr().out


def test_wrong_tokens_are_found_and_told(run_dir, monkeypatch, capsys):
    """Acceptance that spoils every bonus token below a tree: only autoregressive decoding stays right."""
    accept = round_module.accept

    def spoiled(tree, *arguments):
        acceptance = accept(tree, *arguments)
        if len(tree) > 1:
            last = acceptance.count - 1
            acceptance.emitted_D[last] = (acceptance.emitted_D[last] + 1) % VOCAB
        return acceptance

    monkeypatch.setattr(round_module, "accept", spoiled)
    evaluation = run_evaluate(run_dir)
    assert evaluation["lossless"] == {method: method == "autoregressive" for method in METHODS}
    assert set(evaluation["divergences"]) == set(METHODS) - {"autoregressive"}
    assert evaluation["methods"]["graft"]["same_tokens_as_autoregressive"] == 0
    first = evaluation["divergences"]["graft"][0]
    assert first["prompt"] == "file0.py@0"
    assert 0 < first["position"] - 5 < 16  # behind the prompt and the prefill's token
    assert first["top2_margin"] > 0
    assert "graft is not lossless" in (run_dir / "evaluation" / "report.md").read_text()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("graft ")]
    assert rows[0].rstrip().endswith("NO")


def test_a_margin_is_the_gap_between_the_targets_two_best_tokens(run_dir):
    engine = GraftEngine.from_pretrained(run_dir / "bundle", run_dir / "target")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "target")
    expected, found = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([3, 1, 4, 2, 5])
    divergence = lossless._divergence(engine, "x", expected, found)
    with torch.no_grad():
        best = model(torch.tensor([[3, 1, 4]])).logits[0, -1].sort(descending=True).values
    assert divergence["position"] == 3
    assert divergence["top2_margin"] == pytest.approx(float(best[0] - best[1]), abs=1e-5)
    shorter = lossless._divergence(engine, "x", expected, found[:3])
    assert shorter["position"] == 3


def test_the_targets_own_sampling_settings_do_not_blur_the_check(run_dir):
    """A checkpoint's penalties are not its greedy law; its end of sequence is."""
    outputs = GraftEngine.from_pretrained(run_dir / "bundle", run_dir / "target").generate(torch.arange(5), 16)
    eos = int(outputs.sequences[0, 9])
    GenerationConfig(
        repetition_penalty=5.0, do_sample=True, temperature=3.0, top_k=2, eos_token_id=[eos, 60]
    ).save_pretrained(run_dir / "target")
    assert run_evaluate(run_dir)["lossless"] == dict.fromkeys(METHODS, True)


def test_a_target_spread_over_devices_is_measured_and_checked(run_dir, monkeypatch):
    """Half of its layers in memory, half fetched from the disk for every pass."""
    spread = spread_over_devices(monkeypatch)
    config = config_for(run_dir, prompts=1, repeats=1)
    config.target.device_map = "auto"
    evaluation = json.loads((evaluate(config) / "evaluation.json").read_text())
    assert evaluation["lossless"] == dict.fromkeys(METHODS, True)
    assert evaluation["methods"]["graft"]["accepted_per_round"]["matrix"] > 0
    assert spread == [True] * 3, "timed, references, checked"


def test_one_target_is_in_memory_at_a_time(run_dir, monkeypatch):
    load, models = AutoModelForCausalLM.from_pretrained, []

    def watched(*arguments, **named):
        assert all(model() is None for model in models)
        loaded = load(*arguments, **named)
        models.append(weakref.ref(loaded[0] if isinstance(loaded, tuple) else loaded))
        return loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    run_evaluate(run_dir)
    assert len(models) == 3, "timed, references, checked"


def test_a_sampled_run_is_still_checked_greedily(run_dir):
    evaluation = run_evaluate(run_dir, temperature=1.0)
    assert evaluation["lossless"] == dict.fromkeys(METHODS, True)
    assert evaluation["settings"]["temperature"] == 1.0


def test_methods_are_interleaved_and_the_warm_up_is_left_out(run_dir, monkeypatch):
    calls: list[str] = []
    generate = GraftEngine.generate

    def recorded(self, input_ids, max_new_tokens=128, temperature=0.0, method="graft", *rest, **named):
        calls.append(method)
        return generate(self, input_ids, max_new_tokens, temperature, method, *rest, **named)

    monkeypatch.setattr(GraftEngine, "generate", recorded)
    config = config_for(run_dir)
    samples = read_samples(run_dir / "data" / "samples.jsonl", "evaluation")
    engine = GraftEngine.from_pretrained(run_dir / "bundle", run_dir / "target")
    runs = timing.interleaved(engine, samples, config.evaluation, seed=0)
    assert {method: [len(repeats) for repeats in runs[method]] for method in METHODS} == dict.fromkeys(METHODS, [2] * 3)
    timed = calls[-2 * 3 * len(METHODS) :]
    assert set(calls[: -len(timed)]) == set(METHODS)
    blocks = [timed[start : start + len(METHODS)] for start in range(0, len(timed), len(METHODS))]
    assert all(set(block) == set(METHODS) for block in blocks)
    assert len({tuple(block) for block in blocks}) == len(blocks)


def test_repetition_is_the_share_of_windows_seen_before():
    """By hand: of the answer's windows of two, (1, 2) and (2, 3) stood in the prompt, (9, 1) is new."""
    sample = Sample("x", "evaluation", [1, 2, 3])
    run = Run([1, 2, 3, 9, 1, 2], GenerationStats(), 0.0)
    assert repetition([sample], [[run]], length=2) == pytest.approx(3 / 5)
    fresh = Run([4, 5, 6], GenerationStats(), 0.0)
    assert repetition([sample], [[fresh]], length=2) == 0


def test_a_graft_plan_that_is_another_methods_is_told(run_dir, capsys):
    """Calibration may find that plain retrieval is fastest; the table must not pass that off as the hybrid."""
    path = run_dir / "bundle" / "graft.json"
    graft = json.loads(path.read_text())
    graft["policy"]["graft"] = graft["policy"]["retrieve"]
    path.write_text(json.dumps(graft))
    run_evaluate(run_dir)
    assert "graft's calibrated plan is that of retrieve" in capsys.readouterr().out
    assert "graft's calibrated plan is that of retrieve" in (run_dir / "evaluation" / "report.md").read_text()


def hand_made(tokens: int, seconds: float, rounds: int, prefill: float = 50.0) -> Run:
    """A run whose decoding took `seconds`, a quarter of it drafting."""
    stats = GenerationStats(rounds=rounds, emitted=tokens + 1)
    stats.seconds |= {"prefill": prefill, "draft": seconds / 4, "verify": 3 * seconds / 4}
    stats.accepted |= {"drafted": tokens - rounds, "bonus": rounds}
    stats.checkpoints["d0"] = rounds
    return Run([0] * (tokens + 1), stats, prefill + seconds)


def test_figures_are_sums_over_prompts_of_median_runs():
    """By hand: 30 tokens in 3 s against 30 in 6 s; the slow repeats and the prefill do not count."""
    runs = [
        [hand_made(10, seconds, 5) for seconds in (1.0, 100.0, 0.9)],
        [hand_made(20, seconds, 5) for seconds in (1.5, 2.0, 70.0)],
    ]
    baseline = [[hand_made(10, 2.0, 10)] * 3, [hand_made(20, 4.0, 20)] * 3]
    found = summarize(runs, baseline)
    assert found["tokens_per_second"] == pytest.approx(10)
    assert found["speedup"] == pytest.approx(2)
    assert found["speedup_interval"] == pytest.approx([2, 2])  # both prompts gained the same
    assert found["acceptance_length"] == pytest.approx(3)
    assert found["ms_per_round"]["draft"] == pytest.approx(75)
    assert found["ms_per_round"]["verify"] == pytest.approx(225)
    assert found["prefill_ms"] == pytest.approx(50_000)
    assert found["accepted_per_round"] == pytest.approx({"drafted": 2, "matrix": 0, "lookup": 0, "bonus": 1})
    assert found["checkpoints"] == {"d0": 10}
    assert found["time_outside_phases"] == pytest.approx(0)


def test_the_interval_spans_prompts_that_gain_differently():
    runs = [[hand_made(10, 1.0, 5)], [hand_made(10, 2.0, 5)], [hand_made(10, 4.0, 5)]]
    baseline = [[hand_made(10, 4.0, 10)]] * 3
    low, high = summarize(runs, baseline)["speedup_interval"]
    assert low == pytest.approx(1)
    assert high == pytest.approx(4)


def of_length(length: int) -> Sample:
    return Sample("a", "evaluation", list(range(length)))


def test_plain_decoding_varies_as_each_prompt_does_against_itself():
    """Prompts whose passes take twice as long as others' are no unsteady machine: quartiles at 0.9 and 1.1."""
    times = (0.8, 0.9, 1.0, 1.1, 1.2)
    baseline = [[hand_made(10, scale * seconds, 10) for seconds in times] for scale in (1, 2)]
    assert plain_variation(baseline, [of_length(3), of_length(900)]) == pytest.approx(0.2)
    ended_at_once = [hand_made(0, 0.0, 0)] * 5
    assert plain_variation([*baseline, ended_at_once], [of_length(3)] * 3) == pytest.approx(0.2)


@pytest.mark.parametrize("slowed", [(), (0, 3, 4, 5, 8)])
def test_prompts_that_were_timed_once_are_held_against_others_of_their_length(slowed):
    """A token costs 1 ms, and 1 ms more for every thousand tokens before it; half of the machine is taken at times."""
    lengths = [100 * number for number in range(1, 11)]
    usual = [1e-3 + 1e-6 * length for length in lengths]
    baseline = [
        [hand_made(10, 10 * seconds * (1.5 if number in slowed else 1), 10)] for number, seconds in enumerate(usual)
    ]
    found = plain_variation(baseline, list(map(of_length, lengths)))
    assert found > 0.3 if slowed else found == pytest.approx(0.0)


def test_few_prompts_that_were_timed_once_tell_nothing():
    assert plain_variation([[hand_made(10, 1.0, 10)]] * 4, [of_length(3)] * 4) is None


@pytest.mark.parametrize(
    ("variation", "words"),
    [
        (0.1, None),
        (0.23, r"cannot be trusted: .*the same plain decoding varied by 23%.*evaluation\.repeats=4"),
        (None, r"steady is not known.*evaluation\.repeats=4"),
    ],
)
def test_an_unsteady_machine_is_told_beside_the_figures(run_dir, capsys, monkeypatch, variation, words):
    """In the terminal, the report and the card, and whenever they are shown again."""
    monkeypatch.setattr(evaluate_module, "plain_variation", lambda *_: variation)
    assert run_evaluate(run_dir, repeats=2)["variation"] == variation
    again = capsys.readouterr().out
    run_evaluate(run_dir, repeats=2)
    report = (run_dir / "evaluation" / "report.md").read_text().partition("## How")[0]
    card = (run_dir / "bundle" / "README.md").read_text()
    for shown in (again, capsys.readouterr().out, report, card):
        told = re.search(words or "cannot be trusted|not known", shown.replace("\n", " "))
        assert bool(told) == bool(words)


def test_a_target_that_ends_at_once_is_told():
    with pytest.raises(GraftError, match="ended every evaluation prompt at once"):
        summarize([[hand_made(0, 0.0, 0)]], [[hand_made(0, 0.0, 0)]])


def test_a_prompt_too_long_is_named_before_anything_runs(tmp_path, monkeypatch):
    run_dir = write_run(tmp_path, prompt_lengths=(5, 250))
    monkeypatch.setattr(GraftEngine, "generate", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(GraftError, match=r"250 tokens of prompt file1.py@0 exceeds the target's 256 positions"):
        evaluate(config_for(run_dir))
    assert not (run_dir / "evaluation").exists()


def test_without_room_for_any_prompt_the_setting_is_named_before_data_is_read(run_dir, tmp_path):
    (tmp_path / "other.jsonl").write_text("no record")
    config = config_for(run_dir, path=str(tmp_path / "other.jsonl"), max_new_tokens=256)
    with pytest.raises(GraftError, match=r"evaluation\.max_new_tokens=256 leaves no room for a prompt"):
        evaluate(config)


def test_a_prompt_of_another_data_set_with_a_token_that_the_target_lacks_is_named(run_dir, tmp_path):
    path = shutil.copytree(run_dir / "target", tmp_path / "wider")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens("<call>")
    tokenizer.save_pretrained(path)
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "<call>" * 9}) + "\n")
    config = config_for(run_dir, path=str(tmp_path / "other.jsonl"))
    config.target.name_or_path, config.data.prompt_tokens = str(path), 8
    with pytest.raises(GraftError, match=r"other.jsonl, line 1\) has the token '<call>'"):
        asked_of(config, run_dir)


@pytest.mark.parametrize("served", [False, True])
def test_another_data_set_that_changes_while_it_is_read_is_told(run_dir, tmp_path, monkeypatch, served):
    """Nothing is timed, and nothing recorded: the record would tell of prompts that were not asked."""
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps({"text": "a b c " * 9}) + "\n")

    def read_first(*arguments):
        documents = read_documents(*arguments)
        path.write_text(json.dumps({"text": "d e f " * 9}) + "\n")
        return documents

    monkeypatch.setattr("graft_train.evaluate.prompts.read_documents", read_first)
    config = config_for(run_dir, path=str(path))
    config.data.prompt_tokens = 6
    if served:
        monkeypatch.setattr("graft_train.evaluate.served.context_limit", lambda urls: None)
        monkeypatch.setattr(Server, "at", lambda url: Server(url, "tiny"))
        config.evaluation.server = "http://127.0.0.1:9/v1"
    with pytest.raises(GraftError, match=r"no prompts by evaluation\.path=.*the files of evaluation\.path changed"):
        evaluate(config)
    assert not list(tmp_path.glob("evaluation*/evaluation.json")) + list(tmp_path.glob("evaluation*/timed.json"))


def test_another_data_set_is_measured_beside_the_held_out_prompts(run_dir, tmp_path):
    """Its own directory and its own table on the card; the run's data need not be there."""
    run_evaluate(run_dir)
    shutil.rmtree(run_dir / "data")
    words = AutoTokenizer.from_pretrained(run_dir / "target").convert_ids_to_tokens(list(range(5, 9)))
    rows = [{"text": " ".join(words * (3 + place))} for place in range(9)]
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_for(run_dir, path=str(path), prompts=2, repeats=1)
    config.data.prompt_tokens = 6
    directory = evaluate(config)
    assert directory.name.startswith("evaluation-other-")
    evaluation = json.loads((directory / "evaluation.json").read_text())
    assert evaluation["settings"]["prompts"] == 2
    assert evaluation["settings"]["prompt_tokens"] == [6, 6]
    assert evaluation["lossless"] == dict.fromkeys(METHODS, True)
    assert "2 prompts of other.jsonl, of 6-6 tokens" in (directory / "report.md").read_text()
    card = (run_dir / "bundle" / "README.md").read_text()
    own, other = (
        f"{asked}, temperature 0.0. Measured"
        for asked in ("3 held-out prompts of the run's own data", "2 prompts of other.jsonl")
    )
    assert 0 < card.index(own) < card.index(other)
    assert not [file for file in (run_dir / "bundle").glob("evaluation*") if str(tmp_path) in file.read_text()]
    assert directory_of(EvaluateConfig(path="org/set", hub_subset="main")) == "evaluation-org-set-main"
    config.data.prompt_tokens = 5
    with pytest.raises(GraftError, match="made with other settings: prompt_tokens: 6 -> 5"):
        evaluate(config)
    with path.open("a") as file:
        file.write(json.dumps({"text": "more"}) + "\n")
    with pytest.raises(GraftError, match=r"made with other settings: data\.contents"):
        evaluate(config)
    path.unlink()
    with pytest.raises(GraftError, match=r"no prompts by evaluation\.path=.*other\.jsonl.* does not exist"):
        evaluate(config)


@pytest.mark.parametrize("settings", [{"prompts": 0}, {"repeats": 0}, {"max_new_tokens": 1}], ids=str)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(GraftError, match=f"evaluation.{next(iter(settings))}=.* must be at least"):
        EvaluateConfig(**settings)


def test_a_missing_bundle_names_the_recipe(run_dir):
    (run_dir / "bundle").rename(run_dir / "elsewhere")
    with pytest.raises(GraftError, match=r"bundle is missing; run graft export"):
        evaluate(config_for(run_dir))
