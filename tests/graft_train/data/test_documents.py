import json

import pytest

from graft_inference.errors import GraftError
from graft_train.data.documents import DataConfig, document_settings, of_split, read_documents, split_of


def jsonl(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return DataConfig(path=str(path))


def test_reads_text_messages_and_sharegpt(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    config = jsonl(tmp_path / "a.jsonl", {"text": "x = 1"}, {"messages": chat}, {"id": "s", "conversations": shared})
    text, messages, conversations = read_documents(config)
    assert text.text == "x = 1"
    assert messages.messages == conversations.messages == tuple(chat)
    assert conversations.id == "s"


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"text": "a"}, {"body": "b"}], r"line 2 has none of the fields text.*\['body'\]"),
        ([{"text": "a"}, "{oops"], "line 2 is not a JSON object"),
        ([{"text": 3}], "line 1: the field text must be a string"),
        ([{"messages": [{"role": "user"}]}], "line 1: every turn needs"),
        ([{"conversations": [{"from": "bob", "value": "x"}]}], "line 1: unknown speaker 'bob'"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "line 1: .*no turn"),
        ([{"id": 1, "text": "a"}, {"id": 1, "text": "b"}], "line 2 repeats the id '1'"),
        ([{"text": "  "}], "holds no text"),
    ],
)
def test_bad_records_are_named(tmp_path, rows, complaint):
    with pytest.raises(GraftError, match=complaint):
        read_documents(jsonl(tmp_path / "a.jsonl", *rows))


def test_bad_files_are_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, complaint in [
        ("empty.jsonl", "is empty"),
        ("latin.txt", "latin.txt is not UTF-8"),
        ("none.jsonl", "does not exist"),
    ]:
        with pytest.raises(GraftError, match=complaint):
            read_documents(DataConfig(path=str(tmp_path / name)))


def test_repeated_records_are_one_document(tmp_path):
    assert len(read_documents(jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}, {"text": "a"}))) == 2


def test_a_directory_is_read_without_hidden_and_empty_files(tmp_path):
    for name, text in {"b/x.py": "b", "a.py": "a", ".git/c.py": "c", "d.py": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [document.id for document in read_documents(DataConfig(path=str(tmp_path)))] == ["a.py", "b/x.py"]
    assert len(read_documents(DataConfig(path=str(tmp_path), limit=1))) == 1


def test_splits_are_shares_and_do_not_depend_on_other_documents(tmp_path):
    config = DataConfig(calibration_share=0.1, evaluation_share=0.2)
    splits = [split_of(str(i), config) for i in range(4000)]
    assert 0.17 < splits.count("evaluation") / 4000 < 0.23
    assert 0.08 < splits.count("calibration") / 4000 < 0.12
    alone = jsonl(tmp_path / "one.jsonl", {"id": "x", "text": "x"})
    many = jsonl(tmp_path / "two.jsonl", *({"id": name, "text": name} for name in "abx"))
    assert read_documents(alone)[0].split == read_documents(many)[2].split


def test_empty_split_is_an_error(tmp_path):
    config = jsonl(tmp_path / "a.jsonl", {"text": "a"})
    config.evaluation_share = 0.0
    with pytest.raises(GraftError, match="evaluation split"):
        of_split(read_documents(config), "evaluation", config)


def test_settings_notice_changed_contents(tmp_path):
    config = jsonl(tmp_path / "a.jsonl", {"text": "a"})
    before = document_settings(config)
    assert document_settings(config) == before
    jsonl(tmp_path / "a.jsonl", {"text": "b"})
    assert document_settings(config) != before


def test_standard_library_is_there_without_tests():
    ids = {document.id for document in read_documents(DataConfig())}
    assert "argparse.py" in ids
    assert not any("test" in identity.split("/")[:-1] for identity in ids)
