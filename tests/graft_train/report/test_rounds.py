"""What the viewer shows of a round is what the engine did in it."""

from dataclasses import replace

import pytest
import torch

from graft_inference import GraftError
from graft_inference.decode import round as round_module
from graft_inference.policy.plan import AUTOREGRESSIVE
from graft_inference.tree import Source
from graft_train.calibrate.replay import Replay
from graft_train.calibrate.texts import TEXTS, read_texts, texts_of
from graft_train.files import write_json
from graft_train.report.rounds import PlanRounds, rows_of, shown_rounds

from ...graft_inference.tiny_bundle import tiny_tokenizer
from ..calibrate.test_calibrate import BUDGET, LATENCY, NEW, chains, plans


def watched(monkeypatch, engine, prompt, plan, temperature, seed):
    """The text that the engine wrote, and what it verified in each round: trees and which nodes were accepted."""
    seen, judge = [], round_module.judge

    def recorded(*arguments):
        verified = judge(*arguments)
        seen.append((verified.tree, verified.acceptance.accepted_N))
        return verified

    with monkeypatch.context() as patch:
        patch.setattr(round_module, "judge", recorded)
        out = engine.generate(prompt, NEW, temperature, plan=plan, seed=seed)
    return out, seen


def nodes_of(tree, accepted_N):
    """By path: source and score, and the accepted paths."""
    real = [row for row in range(1, len(tree)) if tree.sources_N[row] != Source.EMPTY]
    scores = {int(tree.paths_N[row]): (int(tree.sources_N[row]), float(tree.logp_N[row])) for row in real}
    return scores, {int(tree.paths_N[row]) for row in real if accepted_N[row]}


def check_rounds(monkeypatch, engine, prompts, traces, plan, temperature=0.0):
    rounds = PlanRounds(plan, Replay(traces, LATENCY, BUDGET, plan.shares_noise))
    for number, prompt in enumerate(prompts):
        out, seen = watched(monkeypatch, engine, prompt, plan, temperature, number)
        answer = out.sequences[0, len(prompt) :].tolist()
        start = place = int((traces.prompt_T < number).sum())
        for tree, accepted_N in seen:
            made = rounds.at(place, answer[place - start])
            ours, theirs = nodes_of(made.tree, made.accepted_N), nodes_of(tree, accepted_N)
            assert {path: source for path, (source, _) in ours[0].items()} == {
                path: source for path, (source, _) in theirs[0].items()
            }
            assert all(ours[0][path][1] == pytest.approx(score, abs=1e-4) for path, (_, score) in theirs[0].items())
            if place + made.emitted < start + len(answer) - 1:  # the end cuts the last round short
                assert ours[1] == theirs[1]
                assert made.emitted == 1 + len(theirs[1])
            place += made.emitted
        assert place == start + len(answer) - 1
        assert sum(len(nodes_of(*one)[1]) for one in seen), "nothing was ever accepted"


@pytest.mark.parametrize(
    "name", ["tree", "pruned at two checkpoints", "quotas", "retrieved alone", "everything", "lookup and head"]
)
def test_replayed_trees_are_those_that_the_engine_verifies(monkeypatch, engine, prompts, traces, name):
    check_rounds(monkeypatch, engine, prompts, traces, plans(traces)[name])


def test_replayed_chains_are_those_that_the_engine_verifies(monkeypatch, engine, prompts, chain_traces):
    check_rounds(monkeypatch, engine, prompts, chain_traces, chains(chain_traces)["everything"])


def test_replayed_trees_are_those_of_draws_whose_noise_is_told(monkeypatch, spelling_engine, prompts, told, tmp_path):
    plan = replace(plans(told)["everything"], shares_noise=True)
    check_rounds(monkeypatch, spelling_engine, prompts, told, plan, temperature=0.6)
    write_json(tmp_path / TEXTS, texts_of(spelling_engine, prompts, [told], 0.6))
    for answer, prompt in zip(read_texts(tmp_path / TEXTS, told)[0], prompts, strict=True):
        out = spelling_engine.generate(prompt, NEW, 0.6, plan=plan, seed=answer.number)
        assert answer.tokens == out.sequences[0, len(prompt) :].tolist()


def test_a_round_says_why_drafting_stopped_and_what_it_took(traces):
    plan = plans(traces)["everything"]
    replay = Replay(traces, LATENCY, BUDGET)
    rounds, promise_T = PlanRounds(plan, replay), replay.promise(plan.acceptance)
    for index, words in enumerate(("head was not asked.", "drafting stopped.", "3 draft steps, the plan's most")):
        place = int((rounds.outcome.checkpoint_T == index).nonzero()[0][0])
        made = rounds.at(place, 0)
        assert words in made.why
        assert f"promised {promise_T[place]:.2f} tokens, {'not over' if index else 'over'} 6.00" in made.why
        if index:
            stop = "at most" if index == 1 else "more than"
            assert f"After 1 draft step the head was {replay.confidence_TP[place, 0]:.0%} sure, {stop} 30%" in made.why
        assert sum(made.ms.values()) == pytest.approx(rounds.outcome.ms_T[place])
        assert list(made.ms) == ["draft", "graft", "verify", "commit"]
        assert made.ms["draft"] == pytest.approx([0.0, 0.2, 0.6][index] + 0.01)


def test_positions_can_be_taken_out_of_traces(traces):
    part = rows_of(traces, traces.prompt_T == 1)
    assert len(part) == NEW - 1
    assert torch.equal(part.truth_TD, traces.truth_TD[traces.prompt_T == 1])
    assert torch.equal(part.sources["matrix"].tokens_TR, traces.sources["matrix"].tokens_TR[traces.prompt_T == 1])
    assert part.sources["matrix"].template == traces.sources["matrix"].template


@pytest.fixture
def spelling_engine(engine, monkeypatch):
    monkeypatch.setattr(engine, "tokenizer", tiny_tokenizer())
    return engine


def test_shown_answers_are_the_traced_ones(spelling_engine, prompts, traces, tmp_path):
    write_json(tmp_path / TEXTS, texts_of(spelling_engine, prompts, [traces], 0.0))
    answers, spelled = read_texts(tmp_path / TEXTS, traces)
    everything = plans(traces)["everything"]
    methods = {"graft": everything, "eagle3": plans(traces)["tree"], "autoregressive": AUTOREGRESSIVE}
    shown = shown_rounds(methods, LATENCY, {False: traces}, answers, spelled)
    assert len(shown) == len(prompts)
    for prompt, one, answer in zip(prompts, shown, answers, strict=True):
        out = spelling_engine.generate(prompt, NEW, plan=everything)
        text = tiny_tokenizer().decode(out.sequences[0, len(prompt) :])
        assert "".join(piece for piece, _, _ in one["tokens"]) == text
        assert answer.prompt == tiny_tokenizer().decode(prompt)
        names = {"head": "drafted", "target": "bonus"}
        assert [names.get(source, source) for _, source, _ in one["tokens"][1:]] == out.stats.sources[1:]
        assert [round for _, _, round in one["tokens"]][:2] == [None, 0]
        assert len(one["rounds"]) == out.stats.rounds
        for made in (round["made"] for round in one["rounds"]):
            assert made["autoregressive"]["nodes"] == []
            assert made["autoregressive"]["emitted"] == 1
            texts = {node[0] for node in made["graft"]["nodes"]}
            assert texts <= set(spelled.values())
            assert all(parent <= row for row, (_, parent, *_) in enumerate(made["graft"]["nodes"]))
    again = texts_of(spelling_engine, prompts, [traces], 0.0)
    write_json(tmp_path / "again.json", again)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / TEXTS).read_bytes()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda values: values["answers"][0]["tokens"].append(1), "text of other traces"),
        (lambda values: values["answers"][1].update(number=2), "text of other traces"),
        (lambda values: values["tokens"].clear(), "text of other traces"),
        (lambda values: values.update(more=1), "text of other traces"),
        (lambda values: values["answers"][0].pop("prompt"), "is not as graft calibrate writes it"),
        (lambda values: values.pop("answers"), "is not as graft calibrate writes it"),
    ],
)
def test_texts_of_other_traces_are_refused(spelling_engine, prompts, traces, tmp_path, damage, told):
    values = texts_of(spelling_engine, prompts, [traces], 0.0)
    damage(values)
    write_json(tmp_path / TEXTS, values)
    with pytest.raises(GraftError, match=rf"{told}.*delete .* and run graft calibrate"):
        read_texts(tmp_path / TEXTS, traces)


def test_few_answers_are_kept(spelling_engine, prompts, traces, monkeypatch):
    monkeypatch.setattr("graft_train.calibrate.texts.SHOWN", 1)
    monkeypatch.setattr("graft_train.calibrate.texts.MOST_TOKENS", 5)
    monkeypatch.setattr("graft_train.calibrate.texts.MOST_CHARACTERS", 3)
    values = texts_of(spelling_engine, prompts, [traces, replace(traces)], 0.0)
    assert [len(one["tokens"]) for one in values["answers"]] == [5]
    assert values["answers"][0]["prompt"] == tiny_tokenizer().decode(prompts[0])[-3:]
