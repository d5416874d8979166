"""vLLM started from a repository alone: the head there names its target's, on a Hub of the loopback."""

import shutil

import huggingface_hub
import pytest

from graft_inference.files import read_json
from graft_train.files import write_json
from tests.hub import serve

from .environments import run_vllm
from .pair import NEW_TOKENS, SERVED, chain, greedy

pytestmark = pytest.mark.engines("vllm")


def test_a_repository_is_all_that_vllm_needs(tmp_path, target, bundle_of, monkeypatch):
    """Pushed with both dialects in it, it drafts what it drafts from a directory."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    directory, model = target
    bundle = bundle_of("eagle3")
    head = shutil.copytree(bundle, tmp_path / "head")
    config = read_json(head / "config.json")
    assert config["speculators_config"]["verifier"]["name_or_path"] == str(directory)
    config["speculators_config"]["verifier"]["name_or_path"] = "someone/target"  # as of a target that is from the Hub
    write_json(head / "config.json", config)
    with serve() as hub:
        api = huggingface_hub.HfApi(endpoint=hub.url, token=hub.token)
        for name, files in {"someone/target": directory, "someone/head": head}.items():
            api.create_repo(name)
            api.upload_folder(repo_id=name, folder_path=files)
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        found = run_vllm(
            tmp_path,
            target="someone/head",
            prompts=SERVED.tolist(),
            max_tokens=NEW_TOKENS,
            speculative_config=None,
            environment=online | {"HF_HOME": str(tmp_path / "home")},
        )
    tokens, rounds = chain(bundle, directory, 3)
    accepted = [count for prompt in rounds for count in prompt]
    assert found["tokens"] == tokens == greedy(model, SERVED)
    assert (found["drafts"], found["draft_tokens"]) == (len(accepted), 3 * len(accepted))
    assert found["accepted_per_position"] == [sum(count > place for count in accepted) for place in range(3)]
