"""`regenerate` through the server that this project has itself."""

from graft_inference import GraftEngine
from graft_train.data.chat import Chat
from graft_train.data.prompts import Prompt
from graft_train.data.samples import read_samples
from graft_train.regenerate import RegenerateConfig
from graft_train.regenerate.servers import ask_servers
from tests.graft_inference.serving import served, write_pair
from tests.graft_inference.tiny import VOCAB


def test_answers_are_the_tokens_that_the_target_draws(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    bundle = write_pair(tmp_path, positions=256)
    engine = GraftEngine.from_pretrained(bundle, tmp_path / "target", "cpu", "float32", fallback=False)
    prompts = [Prompt(f"p{number}", [3, 9 + number, 1, 4]) for number in range(8)]
    chat = Chat(engine.tokenizer, set(engine.eos_token_ids), None, VOCAB)
    with served(bundle) as server:
        asked = RegenerateConfig(base_url=server.url, max_new_tokens=12, batch=3, temperatures=[0.0, 0.8])
        ask_servers(prompts, tmp_path / "samples", asked, 100, chat)
    found = {sample.id: sample for sample in read_samples(tmp_path / "samples", "train")}
    for number, prompt in enumerate(prompts):
        out = engine.generate(prompt.ids, 12, temperature=[0.0, 0.8][number % 2], seed=100 + number)
        assert found[prompt.id].answer_ids == out.sequences[0, 4:].tolist()
