from io import StringIO

from rich.console import Console

from graft_train.data.preview import show
from graft_train.data.samples import Sample
from tests.graft_train.tiny_chat import word_tokenizer

GREEN, DIM, RESET = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


def test_trained_tokens_are_coloured_and_their_share_is_shown():
    tokenizer = word_tokenizer(None)
    ids = tokenizer("<user> a <end> <assistant> b <end> <user> c <end> <assistant> d").input_ids
    written = StringIO()
    console = Console(file=written, force_terminal=True, color_system="standard", width=100, highlight=False)
    show(
        [Sample("first", "train", ids, [[4, 6], [10, 11]]), Sample("other", "train", ids)],
        word_tokenizer(None),
        console,
    )
    out = written.getvalue()
    assert (
        f"{DIM}<user> a <end> <assistant>{RESET}{GREEN}b <end>{RESET}{DIM}<user> c <end> <assistant>{RESET}{GREEN}d"
        in out
    )
    assert "3 of 22 (13.6%) in 2 samples" in out
    assert "first" in out
