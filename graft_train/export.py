"""`export`: the bundle, one directory that the runtime, transformers and other engines load."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

import graft_inference
from graft_inference import METHODS, GraftError
from graft_inference.bundle import describe_target, load_bundle
from graft_inference.files import read_json
from graft_inference.heads.checkpoint import CONFIG_FILE
from graft_inference.heads.families import described, load_any_config, load_any_head
from graft_train.config import Config
from graft_train.data.target import load_tokenizer, target_path, text_config
from graft_train.engines import check_engines, faults_of, serving
from graft_train.files import only_one, told, write_json, write_text
from graft_train.flat_code import flat_modules
from graft_train.head_files import head_writer, write_apart
from graft_train.hub import check_repo_id
from graft_train.processes import is_main, say
from graft_train.stage import RECORD, fingerprints_of, run_stage
from graft_train.tables import asked_of, categories_of, unsteady

EVALUATION = "evaluation"
"""Of the run's own held-out prompts; those of another data set have its name behind it."""
REQUIREMENTS = ("torch>=2.11", "transformers>=5.17", "safetensors>=0.5", "huggingface_hub>=1.31", "jinja2>=3.1")
"""The runtime's; transformers checks them before it runs the bundle's code."""

CARD = Path(__file__).parent / "model_card.md"
"""The model card as a Jinja template."""


def export(config: Config) -> Path:
    """Writes `bundle/`, and pushes it if asked, newly made or reused.

    Raises:
        GraftError: stages that do not fit together, a head that an engine of `export.engines` would run wrong, or a
            push without a repository or permission.
    """
    settings = config.export
    if settings.push_to_hub:
        check_repo_id(settings.repo_id, "export.push_to_hub=true")
    run_dir = Path(config.run_dir)
    if settings.engines:
        fingerprints_of(config, ["head"])  # a missing stage is told first
        layers = text_config(config.target).num_hidden_layers
        check_engines(settings.engines, load_any_config(run_dir / "head", layers), layers)
    bundle = run_stage(
        config,
        "export",
        "bundle",
        {"license": settings.license, "policy": _hash_of(run_dir / "policy" / "policy.json")}
        | _adopted(run_dir / "head"),
        ["target", "head", "corpus", "policy"],
        lambda out: _build(config, out, run_dir / "bundle"),
    )
    if is_main():
        if "openvino" in settings.engines:
            with told(bundle), only_one(bundle, waits=True):
                write_apart(bundle, bundle / "openvino")
        write_card(bundle, _evaluations_of(bundle, run_dir))
        if settings.push_to_hub:
            push(bundle, str(settings.repo_id), settings.private)
    return bundle


def write_card(bundle: Path, evaluations: dict[str, dict[str, Any]]) -> None:
    """Writes the model card anew, with the bundle's newest evaluations, where it does not hold them yet.

    A bundle that may not be written keeps the card that it has.

    Args:
        evaluations: what `evaluate` found, by the directories' names; kept in the bundle beside others there.

    Raises:
        GraftError: the disk is full.
    """
    if _is_current(bundle, evaluations):
        return
    if not os.access(bundle, os.W_OK):
        say(f"export: {bundle} cannot be written, and keeps the card that it has")
        return
    with told(bundle), only_one(bundle, waits=True):
        for name, evaluation in evaluations.items():
            write_json(bundle / f"{name}.json", evaluation)
        write_text(bundle / "README.md", _card(bundle, str(bundle)))


def _is_current(bundle: Path, evaluations: dict[str, dict[str, Any]]) -> bool:
    """Whether there is nothing for `write_card` to write."""
    paths = {name: bundle / f"{name}.json" for name in evaluations}
    kept = all(path.exists() and read_json(path) == evaluations[name] for name, path in paths.items())
    card = bundle / "README.md"
    return kept and card.exists() and card.read_text(encoding="utf-8") == _card(bundle, str(bundle))


def push(bundle: Path, repo_id: str, private: bool) -> str:
    """Uploads a bundle whose code and card name the repository instead of this machine's path.

    Returns:
        The repository's id, owner included.

    Raises:
        GraftError: no permission, or no connection.
    """
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as directory:
            copy = Path(directory) / "bundle"
            own = shutil.ignore_patterns(RECORD, "README.md", "custom_generate")
            shutil.copytree(bundle.resolve(), copy, ignore=own, copy_function=os.symlink)
            _write_code(copy, repo_id)
            write_text(copy / "README.md", _card(bundle, repo_id))
            url = api.upload_folder(repo_id=repo_id, folder_path=copy, commit_message="Graft bundle")
    except Exception as error:  # the client's own kinds, and those of the HTTP library under it
        raise GraftError(
            f"the bundle in {bundle} could not be pushed to {repo_id} ({error}): check the connection and "
            "`hf auth whoami`, then run graft export with the same settings again"
        ) from error
    say(f"export: pushed to {url}")
    return repo_id


def _build(config: Config, out: Path, final: Path) -> None:
    run_dir = Path(config.run_dir)
    head_writer(config.target)(load_any_head(run_dir / "head", text_config(config.target).num_hidden_layers), out)
    _copy(run_dir / "corpus" / "successors.safetensors", out)
    policy = read_json(run_dir / "policy" / "policy.json")
    tokenizer = load_tokenizer(config.target)
    path = target_path(config.target)
    target_config = text_config(config.target)
    name = config.target.name_or_path or str(path)
    graft = {
        "policy": policy,
        "target": describe_target(name, target_config, tokenizer),
    }
    write_json(out / "graft.json", graft)
    _write_index(out)
    _write_code(out, str(final.resolve()))
    # A bundle that the engine would refuse must not appear.
    load_bundle(out, target_config, tokenizer)
    write_text(out / "README.md", _card(out, str(final)))
    layers = target_config.num_hidden_layers
    for fault in faults_of(load_any_config(out, layers), layers):
        say(f"export: {fault}")


def _copy(source: Path, directory: Path) -> None:
    if not source.is_file():
        raise GraftError(f"{source} is missing: delete {source.parent} and run its recipe again")
    shutil.copyfile(source, directory / source.name)


def _write_index(bundle: Path) -> None:
    """Says which file holds the head: without it vLLM would read every safetensors file as one of its weights."""
    name = "model.safetensors"
    with safe_open(bundle / name, "pt") as weights:
        tensors = sorted(weights.keys())
    size = {"total_size": (bundle / name).stat().st_size}
    write_json(bundle / f"{name}.index.json", {"metadata": size, "weight_map": dict.fromkeys(tensors, name)})


def _write_code(bundle: Path, location: str) -> None:
    """Writes `custom_generate/`: the runtime's modules, and the one that leads transformers to them."""
    directory = bundle / "custom_generate"
    directory.mkdir(exist_ok=True)
    modules = flat_modules(Path(graft_inference.__file__).parent, "custom_generate")
    code = modules.pop("custom_generate")
    for name, text in modules.items():
        write_text(directory / f"{name}.py", text)
    with (bundle / "model.safetensors").open("rb") as weights:
        weights_hash = hashlib.file_digest(weights, "sha256").hexdigest()
    for name, value in {"BUNDLE": location, "WEIGHTS_SHA256": weights_hash}.items():
        before, after = code.split(f'\n{name} = ""\n')
        code = f"{before}\n{name} = {value!r}\n{after}"
    write_text(directory / "generate.py", code)
    write_text(directory / "requirements.txt", "\n".join(REQUIREMENTS) + "\n")


def _card(bundle: Path, location: str) -> str:
    """The model card: what it is, how to use it from `location`, what the evaluation found."""
    graft = read_json(bundle / "graft.json")
    target = graft["target"]["name_or_path"]
    tag, head = described(bundle)
    layers = graft["target"]["num_hidden_layers"]
    dtype = read_json(bundle / CONFIG_FILE)["dtype"]
    paths = sorted(bundle.glob(f"{EVALUATION}*.json"), key=lambda path: path.stem)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=target if _is_hub_id(target) else None,
        license=read_json(bundle / RECORD)["settings"]["license"],
        tags=["speculative-decoding", tag, "graft"],
    )
    card = ModelCard.from_template(
        data,
        template_str=CARD.read_text(encoding="utf-8"),
        target=target,
        location=location,
        head=head,
        adopted=read_json(bundle / RECORD)["settings"].get("adopted"),
        engines=serving(load_any_config(bundle, layers), layers, target, location, dtype).values(),
        device=graft["policy"]["measured_on"].get("device"),
        evaluations=list(map(read_json, paths)),
        methods=METHODS,
        asked_of=asked_of,
        categories_of=categories_of,
        unsteady=unsteady,
    )
    return str(card)


def _is_hub_id(target: str) -> bool:
    try:
        validate_repo_id(target)
    except HFValidationError:
        return False
    return not Path(target).exists()


def _hash_of(policy: Path) -> str:
    """Of a policy that may be chosen anew from the same traces; empty where its stage is missing, which is told later.

    Raises:
        GraftError: the stage is there and the policy is not; told before a bundle is begun without one.
    """
    if policy.parent.is_dir() and not policy.is_file():
        raise GraftError(f"{policy} is missing: delete {policy.parent} and run graft calibrate again")
    return hashlib.sha256(policy.read_bytes()).hexdigest()[:16] if policy.is_file() else ""


def _adopted(head: Path) -> dict[str, str]:
    """Of a head from the Hub that others published: which, as the card says."""
    record = read_json(head / RECORD) if (head / RECORD).is_file() else {}
    if record.get("stage") != "adopt" or record["settings"]["commit"] is None:
        return {}
    return {"adopted": f"{record['settings']['init_from']} at {record['settings']['commit']}"}


def _evaluations_of(bundle: Path, run_dir: Path) -> dict[str, dict[str, Any]]:
    """The finished evaluations of this very bundle, by their directories' names."""
    found, own = {}, read_json(bundle / RECORD)["fingerprint"]
    for path in run_dir.glob(f"{EVALUATION}*/{EVALUATION}.json"):
        record = path.with_name(RECORD)
        if path.parent.suffix != ".partial" and record.exists() and read_json(record)["inputs"].get("bundle") == own:
            found[path.parent.name] = read_json(path)
    return found
