"""`graft texts RUN_DIR FILE`: a run's texts as SGLang takes them for its own retrieval.

SGLang's NGRAM looks continuations up in corpora that it is given: by `--speculative-ngram-external-corpus-path FILE`,
or while it serves by its endpoint `/add_external_corpus`. Such a file holds a JSON string a line. Read in the source of
0.5.23, whose own reader a test runs.
"""

import json
from pathlib import Path

from transformers import AutoTokenizer

from graft_inference.errors import GraftError
from graft_train.data.samples import Sample, read_samples
from graft_train.files import told, write_text


def write_texts(run_dir: Path, target: str, file: Path) -> None:
    """Writes the training samples of a run, prompt and answers each, and says how many tokens they are.

    Special tokens stay in the texts, so that SGLang's tokens are those that it will see in requests.

    Args:
        target: directory or Hub id, whose tokenizer the samples were made with.

    Raises:
        GraftError: no samples, no tokenizer, or a file that cannot be written.
    """
    samples = run_dir / "data" / "samples.jsonl"
    if not samples.is_file():
        raise GraftError(f"{samples} is missing: run graft regenerate with run_dir={run_dir} first")
    try:
        tokenizer = AutoTokenizer.from_pretrained(Path(target).expanduser())
    except (OSError, ValueError) as error:
        raise GraftError(f"cannot load the tokenizer of {target}: {error}") from error
    kept: dict[str, Sample] = {}
    for sample in read_samples(samples, "train"):
        kept[sample.document if sample.is_turn else sample.id] = sample  # later turns repeat what came before
    largest = max((max(sample.ids, default=0) for sample in kept.values()), default=0)
    if largest >= len(tokenizer):
        raise GraftError(
            f"{target} has {len(tokenizer)} tokens, but the samples hold the token {largest}: name the run's own target"
        )
    lines = [json.dumps(tokenizer.decode(list(sample.ids)), ensure_ascii=False) for sample in kept.values()]
    with told(file.parent):
        write_text(file, "".join(f"{line}\n" for line in lines))
    tokens = sum(len(sample.ids) for sample in kept.values()) + max(len(kept) - 1, 0)
    print(
        f"texts: {len(kept)} texts of {tokens} tokens in {file}; SGLang takes them with "
        f"--speculative-ngram-external-corpus-max-tokens {tokens} or more"
    )
