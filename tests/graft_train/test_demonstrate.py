"""The quickstart ends with an answer of the target, each token coloured by where it came from."""

import io

import torch
from rich.console import Console
from rich.text import Text

from graft_train import demonstrate as module
from graft_train.chat import STYLES
from tests.graft_inference.tiny import tiny_model
from tests.graft_inference.tiny_bundle import tiny_tokenizer
from tests.graft_train.test_evaluate import config_for, write_run


def test_the_shortest_held_out_prompt_is_answered_as_the_target_would_in_the_colours_of_chat(tmp_path, monkeypatch):
    config = config_for(write_run(tmp_path / "run", (9, 5, 7)))
    config.evaluation.fallback = False  # so small a target would soon be left to itself
    console = Console(file=io.StringIO(), record=True, width=1000, color_system="standard", force_terminal=True)
    monkeypatch.setattr(module, "Console", lambda: console)
    monkeypatch.setattr(module, "TOKENS", 30)
    module.demonstrate(config)
    shown = Text.from_ansi(console.export_text(styles=True))

    samples = module.read_samples(tmp_path / "run" / "data" / "samples.jsonl", "evaluation")
    prompt = torch.tensor([samples[1].prompt_ids])
    answer = tiny_model("llama").generate(prompt, max_new_tokens=30)[0, prompt.shape[1] :]
    expected = tiny_tokenizer().decode(answer, skip_special_tokens=True)
    assert tiny_tokenizer().decode(prompt[0]).strip() in shown.plain
    assert expected.splitlines()[0] in shown.plain
    assert "tokens/s, acceptance length" in shown.plain
    assert f"graft chat {config.run_dir}/bundle" in shown.plain
    colours = {span.style.color.name for span in shown.spans if span.style.color}
    assert colours & set(STYLES.values())
