"""What stages leave for later ones: states of the target, traces, latencies and policies."""

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from graft_inference import Policy
from graft_inference.bundle import load_bundle
from graft_inference.files import read_json
from graft_train import calibrate as module
from graft_train.calibrate import calibrate
from graft_train.calibrate.traces import record_traces
from graft_train.data.states import PackedTarget
from graft_train.data.target import text_config
from graft_train.distill import state_source
from graft_train.distill.batches import collate, to_tensors
from graft_train.export import export
from graft_train.files import write_json
from tests.graft_inference.tiny import learned_policy
from tests.graft_train.calibrate.test_calibrate import LATENCY
from tests.graft_train.calibrate.test_stage import config_for, write_latency, write_run
from tests.graft_train.distill.pair import VOCAB, samples, tiny_target

from .subject import Directories

TARGET = "of the target"


class States(Directories):
    """Stored states: what is read of each sample is what its rows in the file hold, or it is refused."""

    share = 3

    def __init__(self, root: Path) -> None:
        self.rows = to_tensors(samples(), 64, VOCAB)
        self.target = PackedTarget(tiny_target(), (0, 2, 3))
        tops = {"whole": None, "best": 3}
        for name, top in tops.items():
            self._source(root / name, top)
        super().__init__(root, {name: root / name for name in tops})
        # Where the rows of each sample lie, as they were written.
        self.places = {
            name: state_source.places_of(read_json(root / name / "index.json"), [len(r.tokens_S) for r in self.rows])
            for name in tops
        }

    def use(self) -> str:
        read = self._source(self.damaged, None if self.name == "whole" else 3)
        batch = collate(self.rows, list(range(len(self.rows))), torch.device("cpu"))
        found = read(batch)
        files = {path.name: load_file(path) for path in sorted(self.damaged.glob("*.safetensors"))}
        for name, part in state_source.PARTS.items():
            tensor = getattr(found, part)
            if tensor is None:
                continue
            rows = [files[f"shard-{n:05d}.safetensors"][name][start:end] for n, start, end in self.places[self.name]]
            expected = torch.cat(rows)
            if not torch.equal(tensor, expected.to(tensor.dtype)) or not bool(tensor.isfinite().all()):
                return f"other {name}"
            if not tensor.is_floating_point() and not bool(((tensor >= 0) & (tensor < VOCAB)).all()):
                return f"{name} is no token"
        return "right"

    def _source(self, directory: Path, top: int | None) -> state_source.StateSource:
        accelerator = Accelerator(cpu=True)
        with patch.object(state_source, "SHARD_TOKENS", 50):
            return state_source.disk_states(self.target, self.rows, 40, directory, TARGET, None, accelerator, top)


class Calibrated(Directories):
    """Traces, latency tables and policies: a plan is chosen from them that can be served, or they are refused."""

    share = 3

    def __init__(self, root: Path) -> None:
        self.run = write_run(root / "run")
        self.latency = write_latency(root / "latency.json", num_draft_tokens=[1, 4, 8], verify_ms=[[1.0, 1.1, 1.3]])
        self.config = config_for(self.run)
        sound = root / "policy"
        sound.mkdir()
        prompts, engine = module._prompts(self.config), module._engine(self.config)
        traces = record_traces(engine, prompts, self.config.policy)
        traces.save(sound / "traces.safetensors", module._made_of(self.config))
        engine.target.release()
        write_json(sound / "latency.json", LATENCY.to_dict())
        write_json(sound / "policy.json", learned_policy().to_dict())
        write_json(sound / "stage.json", {"fingerprint": "policy", "settings": {}, "inputs": {}})
        shutil.copyfile(self.latency, sound / "elsewhere.json")
        super().__init__(root, {"policy": sound})

    def use(self) -> str:
        policy = self.run / "policy"
        for path in (policy, self.run / "bundle", self.run / "bundle.partial"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.damaged, policy)
        exported = load_bundle(export(self.config), text_config(self.config.target), None)
        if exported.policy != Policy.from_dict(read_json(policy / "policy.json")):
            return "another policy in the bundle"
        settings = replace(self.config.policy, latency_from=str(policy / "elsewhere.json"))
        config = replace(self.config, policy=settings)
        calibrate(config)
        chosen = Policy.from_dict(read_json(policy / "policy.json"))
        return "right" if chosen.graft.num_draft_tokens <= max(settings.num_draft_tokens) else "a plan that is too wide"
