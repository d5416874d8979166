"""Suites by one word: every turn is measured behind the target's own answers, and figures are told by category."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft_inference import METHODS, GenerationStats, GraftEngine, GraftError
from graft_inference.prompts import is_plain
from graft_train.config import Config
from graft_train.config.evaluation import SUITES, EvaluateConfig
from graft_train.data import sources
from graft_train.data.samples import Sample
from graft_train.evaluate import Run, evaluate
from graft_train.evaluate.prompts import ANSWERS, asked_of, data_of, directory_of
from graft_train.evaluate.summary import acceptance, by_category
from graft_train.tables import parts_of
from tests.graft_inference.tiny_bundle import tiny_tokenizer

from .test_evaluate import config_for, hand_made, write_run

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["tell of rain", "now of snow", "and of both"]},
    {"question_id": 82, "category": "math", "turns": ["what is one and two"]},
    {"question_id": 83, "category": "math", "turns": ["what is two and two", "why"]},
]
IDS = ["81/1", "81/2", "81/3", "82/1", "83/1", "83/2"]


@pytest.fixture
def run_dir(tmp_path) -> Path:
    run_dir = write_run(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "target")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(run_dir / "target")
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return run_dir


def of_suite(run_dir: Path, suite: str | None = "spec_bench", **settings) -> Config:
    settings = {"path": str(run_dir.parent / "question.jsonl"), "repeats": 1, "max_new_tokens": 12} | settings
    return config_for(run_dir, suite=suite, **settings)


def by_hand(run_dir: Path, turns: list[str]) -> list[list[int]]:
    """The prompts of a conversation, by transformers alone."""
    model, tokenizer = (kind.from_pretrained(run_dir / "target") for kind in (AutoModelForCausalLM, AutoTokenizer))
    messages, prompts = [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(text).input_ids)
        prompt = torch.tensor([prompts[-1]])
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
        answer = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    return prompts


def test_later_turns_stand_behind_the_targets_own_answers(run_dir, tmp_path):
    asked = asked_of(of_suite(run_dir), tmp_path)
    found = {sample.id: sample.prompt_ids for sample in asked.samples}
    assert sorted(found) == IDS
    for question in QUESTIONS:
        prompts = by_hand(run_dir, question["turns"])
        assert [found[f"{question['question_id']}/{turn}"] for turn in range(1, len(prompts) + 1)] == prompts
    categories = dict(zip((sample.id for sample in asked.samples), asked.categories, strict=True))
    assert categories == {name: "writing" if name.startswith("81") else "math" for name in IDS}


def test_answers_are_made_once_and_gone_on_from(run_dir, tmp_path, monkeypatch):
    generate, made = GraftEngine.generate, []

    def stopped(self, *arguments, **named):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(named["method"])
        return generate(self, *arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GraftEngine, "generate", stopped)
        asked_of(of_suite(run_dir), tmp_path)
    assert made == ["autoregressive"] * 2
    kept = json.loads((tmp_path / ANSWERS).read_text())
    assert len(kept) == 2
    first = asked_of(of_suite(run_dir), tmp_path)
    whole = json.loads((tmp_path / ANSWERS).read_text())
    assert sorted(whole) == ["81/1", "81/2", "83/1"]
    assert kept.items() <= whole.items()
    monkeypatch.setattr(GraftEngine, "from_pretrained", lambda *_, **__: pytest.fail("asked again"))
    assert asked_of(of_suite(run_dir), tmp_path) == first


def test_answers_whose_text_does_not_say_them_are_no_turns(run_dir, tmp_path, capsys):
    """Of a model that speaks in channels the text alone is what no template would write."""
    asked_of(of_suite(run_dir), tmp_path)
    kept = json.loads((tmp_path / ANSWERS).read_text())
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "target")
    others = {token for name, ids in kept.items() if name != "81/1" for token in ids}
    inside = next(one for one in kept["81/1"][:-1] if one not in others and one != kept["81/1"][-1])
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(inside)]})
    tokenizer.save_pretrained(run_dir / "target")
    with pytest.raises(GraftError, match=r"answer to 81/1 has special tokens within.* data\.on_error=skip"):
        asked_of(of_suite(run_dir), tmp_path)
    config = of_suite(run_dir)
    config.data.on_error = "skip"
    assert sorted(sample.id for sample in asked_of(config, tmp_path).samples) == IDS[3:]
    assert "left out 1 of 3 questions" in capsys.readouterr().out


@pytest.mark.parametrize(("tail", "plain"), [([], True), ([9], True), ([9, 9], True), ([9, 3], False)])
def test_only_how_an_answer_ends_may_be_left_out(tail, plain):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(9)})
    assert is_plain(tokenizer, [5, 41, *tail]) is plain  # a half of a character among them
    assert is_plain(tokenizer, [9, 5, *tail]) is False


def test_a_path_that_is_not_there_is_told_by_the_setting_that_names_it(run_dir, tmp_path):
    for suite in ("spec_bench", None):
        with pytest.raises(GraftError, match=r": evaluation\.path=nope\.jsonl does not exist(?!.*data\.path)"):
            asked_of(of_suite(run_dir, suite, path="nope.jsonl"), tmp_path)


def test_categories_positions_and_contexts_are_told(run_dir, capsys):
    directory = evaluate(of_suite(run_dir, max_new_tokens=40))
    assert directory.name.startswith("evaluation-spec_bench-question-")
    assert not (directory / ANSWERS).exists()
    evaluation = json.loads((directory / "evaluation.json").read_text())
    assert evaluation["lossless"] == dict.fromkeys(METHODS, True)
    assert evaluation["settings"]["prompts"] == len(IDS)
    for found in evaluation["methods"].values():
        assert {name: one["prompts"] for name, one in found["by_category"].items()} == {"math": 3, "writing": 3}
        for buckets in (found["by_position"], found["by_context"]):
            rounds = sum(bucket["rounds"] for bucket in buckets)
            assert rounds == sum(found["checkpoints"].values())
            assert sum(bucket["acceptance_length"] * bucket["rounds"] for bucket in buckets) == pytest.approx(
                found["acceptance_length"] * rounds
            )
        assert [(bucket["from"], bucket["to"]) for bucket in found["by_position"]] == [(0, 31), (32, 63)]
    told = capsys.readouterr().out
    report, card = (path.read_text() for path in (directory / "report.md", run_dir / "bundle" / "README.md"))
    math = evaluation["methods"]["graft"]["by_category"]["math"]
    shown = f"{math['speedup']:.2f}x {math['acceptance_length']:.2f}"
    for text in (told, report):
        assert any(line.strip(" |").startswith("math") and shown in line for line in text.splitlines())
        assert "32-63" in text
        assert "prompts of spec_bench (question.jsonl)" in text
    assert f"graft by category: math {math['speedup']:.2f}x, writing " in card


def test_a_suite_of_one_category_has_no_table_of_it(run_dir):
    (run_dir.parent / "question.jsonl").write_text(json.dumps({"question": "how many", "answer": "2"}) + "\n")
    evaluation = json.loads((evaluate(of_suite(run_dir, "gsm8k")) / "evaluation.json").read_text())
    assert set(evaluation["methods"]["graft"]["by_category"]) == {"math"}
    assert [part.columns[0] for part in parts_of(evaluation)] == ["tokens", "tokens"]
    assert "by category" not in (run_dir / "bundle" / "README.md").read_text()


def test_as_many_questions_as_asked_for_are_taken_from_all_categories(run_dir, tmp_path):
    asked = asked_of(of_suite(run_dir, prompts=2), tmp_path)
    assert set(asked.categories) == {"math", "writing"}
    assert len({sample.id.partition("/")[0] for sample in asked.samples}) == 2


def test_turns_that_are_too_long_are_left_out_and_told(run_dir, tmp_path, capsys):
    rows = [QUESTIONS[0] | {"turns": ["a", "b" * 250, "c"]}, QUESTIONS[1] | {"turns": ["d" * 250]}]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [sample.id for sample in asked_of(of_suite(run_dir), tmp_path).samples] == ["81/1"]
    assert "left out 3 turns of questions, whose prompts are longer than 244 tokens" in capsys.readouterr().out
    (tmp_path / "question.jsonl").write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(GraftError, match="no question has a prompt of at most 244 tokens"):
        asked_of(of_suite(run_dir), tmp_path)


def test_without_a_chat_template_only_texts_are_continued(tmp_path):
    run_dir = write_run(tmp_path / "run")
    (tmp_path / "question.jsonl").write_text(json.dumps({"task_id": "HumanEval/0", "prompt": "def add"}) + "\n")
    with pytest.raises(GraftError, match=r"evaluation.suite=mt_bench, .*no chat template.*evaluation.suite=humaneval"):
        evaluate(of_suite(run_dir, "mt_bench"))
    asked = asked_of(of_suite(run_dir, "humaneval"), tmp_path)
    assert [sample.id for sample in asked.samples] == ["HumanEval/0/1"]
    assert asked.samples[0].prompt_ids == AutoTokenizer.from_pretrained(run_dir / "target")("def add").input_ids


def test_other_fields_are_named_before_the_target_is_loaded(run_dir, monkeypatch):
    (run_dir.parent / "question.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr(GraftEngine, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(GraftError, match=r"no prompts by evaluation.suite=spec_bench.*line 1 is no question of"):
        evaluate(of_suite(run_dir))
    assert not (run_dir / "evaluation").exists()


def test_a_suite_is_read_from_the_hub_where_no_path_is_given(run_dir, tmp_path, monkeypatch):
    calls = []

    def load(path, name, split):
        calls.append((path, name, split))
        return [{"question": "how many", "answer": "2"}]

    monkeypatch.setattr(sources, "load_dataset", load)
    config = of_suite(run_dir, "gsm8k", path=None)
    assert [sample.id for sample in asked_of(config, tmp_path).samples] == ["1/1"]
    assert calls == [("openai/gsm8k", "main", "test")]
    data = data_of(of_suite(run_dir, "speed_bench", path=None, hub_subset="throughput_1k"))
    assert (data.path, data.hub_subset, data.hub_split) == ("nvidia/SPEED-Bench", "throughput_1k", "test")
    assert data_of(of_suite(run_dir, "mt_bench", path=None)).hub_split == "train"


def test_each_suite_has_a_directory_of_its_own():
    found = [directory_of(EvaluateConfig(suite=name)) for name, suite in SUITES.items() if suite.path]
    assert found[:2] == ["evaluation-mt_bench", "evaluation-humaneval"]
    narrowed = EvaluateConfig(suite="speed_bench", hub_subset="throughput_1k")
    assert directory_of(narrowed) == "evaluation-speed_bench-throughput_1k"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"suite": "mtbench"}, r"evaluation.suite=mtbench is unknown; choose one of mt_bench, humaneval"),
        ({"suite": "spec_bench"}, r"evaluation.suite=spec_bench is read from a file.*as evaluation.path"),
    ],
)
def test_impossible_suites_are_refused(settings, words):
    with pytest.raises(GraftError, match=words):
        EvaluateConfig(**settings)


def test_acceptance_by_position_and_context():
    """By hand: rounds of 3, 1 and 1 tokens begin behind 1, 4 and 5 tokens of an answer; one of 40 behind 32."""
    cut = ["prefill", "drafted", "drafted", "bonus", "bonus", "matrix"]
    long = ["prefill", *["bonus"] * 31, *["lookup"] * 39, "bonus", "bonus"]
    runs = [[Run([], GenerationStats(sources=sources), 1.0)] for sources in (cut, long)]
    samples = [Sample("a", "evaluation", [0] * 124), Sample("b", "evaluation", [0] * 10)]
    found = acceptance(runs, samples)
    assert found["by_position"] == [
        {"from": 0, "to": 31, "rounds": 34, "acceptance_length": (5 + 31) / 34},
        {"from": 32, "to": 63, "rounds": 1, "acceptance_length": 40.0},
        {"from": 64, "to": 127, "rounds": 1, "acceptance_length": 1.0},
    ]
    assert found["by_context"] == [
        {"from": 0, "to": 127, "rounds": 34, "acceptance_length": (3 + 31 + 40 + 1) / 34},
        {"from": 128, "to": 255, "rounds": 2, "acceptance_length": 1.0},
    ]


def test_figures_by_category_are_of_its_prompts_alone():
    """By hand: a doubles its speed, b keeps it, c ended at once."""
    runs = [[hand_made(10, 1.0, 5)], [hand_made(20, 4.0, 20)], [hand_made(10, 1.0, 2)], [hand_made(0, 0.0, 0)]]
    baseline = [[hand_made(10, 2.0, 10)], [hand_made(20, 4.0, 20)], [hand_made(10, 2.0, 10)], [hand_made(0, 0.0, 0)]]
    assert by_category(runs, baseline, ["a", "b", "a", "c"]) == {
        "a": {"prompts": 2, "tokens_per_second": 10.0, "speedup": 2.0, "acceptance_length": 20 / 7},
        "b": {"prompts": 1, "tokens_per_second": 5.0, "speedup": 1.0, "acceptance_length": 1.0},
    }
    assert by_category(runs, baseline, []) == {}
