"""The quickstart begins and ends with an answer of the target, each token coloured by where it came from."""

import io
import re

import torch
from rich.console import Console
from rich.text import Text

from graft_train import demonstrate as module
from graft_train import first_answer as first_module
from graft_train.chat import STYLES
from tests.graft_inference.tiny import tiny_model
from tests.graft_inference.tiny_bundle import tiny_tokenizer, write_target
from tests.graft_train.test_evaluate import config_for, write_run

PROMPT = "say that again and say that again"


def coloured_console(monkeypatch, module):
    console = Console(file=io.StringIO(), record=True, width=1000, color_system="standard", force_terminal=True)
    monkeypatch.setattr(module, "Console", lambda: console)
    return console


def answer_to(prompt, count):
    answer = tiny_model("llama").generate(prompt, max_new_tokens=count)[0, prompt.shape[1] :]
    return tiny_tokenizer().decode(answer, skip_special_tokens=True)


def test_before_anything_is_trained_lookup_alone_speeds_an_answer_up(tmp_path, monkeypatch):
    config = config_for(tmp_path / "run")
    write_target(tmp_path / "run" / "target")
    console = coloured_console(monkeypatch, first_module)
    monkeypatch.setattr(module, "TOKENS", 30)
    monkeypatch.setattr(first_module, "PROMPT", PROMPT)
    first_module.first_answer(config)
    shown = Text.from_ansi(console.export_text(styles=True))
    expected = answer_to(tiny_tokenizer()(PROMPT, return_tensors="pt").input_ids, 30)
    assert shown.plain.splitlines()[0].strip() == PROMPT
    assert expected.splitlines()[0] in shown.plain
    assert re.search(r"head 0 matrix 0 lookup [1-9]", shown.plain)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["target"]


def test_the_shortest_held_out_prompt_is_answered_as_the_target_would_in_the_colours_of_chat(tmp_path, monkeypatch):
    config = config_for(write_run(tmp_path / "run", (9, 5, 7)))
    config.evaluation.fallback = False  # so small a target would soon be left to itself
    console = coloured_console(monkeypatch, module)
    monkeypatch.setattr(module, "TOKENS", 30)
    module.demonstrate(config)
    shown = Text.from_ansi(console.export_text(styles=True))

    samples = module.read_samples(tmp_path / "run" / "data" / "samples.jsonl", "evaluation")
    prompt = torch.tensor([samples[1].prompt_ids])
    expected = answer_to(prompt, 30)
    assert tiny_tokenizer().decode(prompt[0]).strip() in shown.plain
    assert expected.splitlines()[0] in shown.plain
    assert "tokens/s, acceptance length" in shown.plain
    assert f"graft chat {config.run_dir}/bundle" in shown.plain
    colours = {span.style.color.name for span in shown.spans if span.style.color}
    assert colours & set(STYLES.values())
