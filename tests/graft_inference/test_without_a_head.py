"""A target without a head: prompt lookup alone speculates, through every way in, and the output is the target's."""

import pytest
import torch

from graft_inference import GraftEngine, GraftError
from graft_inference import cli as runtime_cli
from graft_inference.bundle import load_bundle, recorded_target, served_dtype
from graft_inference.serve import cli as serve_cli

from .test_cli import expected_text
from .test_engine import FAMILIES, SEEDS, SMALL, greedy_reference, prompt
from .tiny import tiny_model
from .tiny_bundle import write_target


def bare_engine(family: str) -> GraftEngine:
    """So few tokens that the text repeats itself, and lookup is often right."""
    model = tiny_model(family, SEEDS[family], vocab_size=SMALL)
    return GraftEngine.from_bundle(load_bundle(None, model.config, None), model, fallback=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_equals_generate_and_tokens_are_looked_up(family):
    engine, found, bonus = bare_engine(family), 0, 0
    for seed in range(4):
        input_ids = prompt(3 + seed, seed, SMALL)
        expected = greedy_reference(engine.target.model, input_ids, 60)
        out = engine.generate(input_ids, max_new_tokens=60)
        assert out.sequences.tolist() == expected.tolist()
        assert out.stats.accepted["drafted"] == out.stats.accepted["matrix"] == 0
        found += out.stats.accepted["lookup"]
        bonus += out.stats.accepted["bonus"]
    assert found + bonus == 4 * 59
    assert found > bonus


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_and_batches_are_those_of_plain_decoding(family):
    engine, prompts = bare_engine(family), [prompt(length, length, SMALL)[0] for length in (2, 9, 5)]
    options = {"max_new_tokens": 40, "temperature": 0.8, "seed": 3, "pad_token_id": 0}
    ours, plain = engine.generate(prompts, **options), engine.generate(prompts, method="autoregressive", **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert ours.stats.accepted["lookup"] > 0


def test_a_model_serves_one_engine_at_a_time():
    model, input_ids = tiny_model("llama"), prompt(9)
    bundle = load_bundle(None, model.config, None)
    expected = greedy_reference(model, input_ids, 20).tolist()
    first = GraftEngine.from_bundle(bundle, model, fallback=False)
    with pytest.raises(GraftError, match=r"serves another engine already: use that one, call its target\.release\(\)"):
        GraftEngine.from_bundle(bundle, model, fallback=False)
    assert first.generate(input_ids, 20).sequences.tolist() == expected
    first.target.release()
    second = GraftEngine.from_bundle(bundle, model, fallback=False)
    assert second.generate(input_ids, 20).sequences.tolist() == expected


def test_it_serves_in_float32_on_a_cpu_and_a_method_that_drafts_is_refused(tmp_path):
    target = write_target(tmp_path / "target")
    assert served_dtype(None, "cpu", "auto") == "float32"
    engine = GraftEngine.from_pretrained(None, target, "cpu", fallback=False)
    assert engine.target.model.dtype == torch.float32
    expected = greedy_reference(tiny_model("llama"), prompt(9), 20)
    assert engine.generate(prompt(9), 20).sequences.tolist() == expected.tolist()
    with pytest.raises(GraftError, match="no draft head, and the plan drafts: choose another method, or load a bundle"):
        engine.generate(prompt(9), 20, method="eagle3")


@pytest.mark.parametrize("options_first", [True, False])
def test_the_runtimes_command_takes_a_prompt_without_a_bundle(tmp_path, capsys, options_first):
    target = write_target(tmp_path / "target")
    options, text = ["--target", str(target), "--device", "cpu", "--max-new-tokens", "20"], ["lorem ipsum\n"]
    assert runtime_cli.main([*options, *text] if options_first else [*text, *options]) == 0
    printed = capsys.readouterr()
    assert printed.out == expected_text("lorem ipsum\n", 20) + "\n"
    assert "accepted: drafted 0, matrix 0, lookup " in printed.err


@pytest.mark.parametrize("command", [runtime_cli.main, serve_cli.main])
def test_a_method_that_drafts_is_refused_before_anything_is_loaded(command, capsys):
    text = ["some text"] if command is runtime_cli.main else []
    assert command(["--target", "no/such/target", "--method", "eagle3", *text]) == 2
    assert "--method eagle3 drafts, and without a bundle there is no head" in capsys.readouterr().err


def test_without_a_bundle_the_target_must_be_named(capsys):
    with pytest.raises(GraftError, match="without a bundle nothing says which model to run: pass --target"):
        recorded_target(None)
    assert serve_cli.main(["--port", "0"]) == 2
    assert "pass --target" in capsys.readouterr().err
