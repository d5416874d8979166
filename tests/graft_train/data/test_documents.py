import json
import re

import datasets
import pytest

from graft_inference.errors import GraftError
from graft_train.config.data import DataConfig, Source
from graft_train.data.documents import document_settings, of_split, read_documents, split_of

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def tool(name, argument):
    properties = {argument: {"type": "string"}}
    return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}


def call(name, **arguments):
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def jsonl(path, *rows, **settings):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return DataConfig(path=str(path), **settings)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_reads_every_kind_of_record_of_a_file(tmp_path):
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    rows = {"text": "x = 1"}, {"messages": CHAT}, {"id": "s", "conversations": shared}
    text, messages, conversations = read_documents(jsonl(tmp_path / "a.jsonl", *rows))
    assert text.text == "x = 1"
    assert messages.conversation.messages == conversations.conversation.messages == tuple(CHAT)
    assert conversations.id == "s"
    assert conversations.place == f"{tmp_path / 'a.jsonl'}, line 3"


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([{"text": "a"}, {"body": "b"}], r"line 2 has none of the fields"),
        ([{"text": "a"}, "{oops"], "line 2 is not JSON"),
        ([{"text": "a"}, ""], "line 2 is empty"),
        ([{"text": "a"}, {"text": "  "}], "line 2 is empty"),
        ([{"text": "a"}, '{"text": "b", "score": NaN}'], "line 2 is not JSON: NaN is no number"),
        ([{"text": "a"}, '{"text": "b", "score": -1e999}'], "line 2 is not JSON: -1e999 is no number"),
        ([{"text": "a"}, '{"text": "b", "text": "d"}'], "line 2 is not JSON: the key 'text' is there twice"),
        ([{"text": "a"}, '{"text": "half \\ud83d"}'], r"line 2 holds half a surrogate pair, '\\ud83d'"),
        ([{"text": "a"}, '{"text": "b", "id": "\\uDC00"}'], r"line 2 holds half a surrogate pair, '\\udc00'"),
        ([{"text": "a"}, '{"text": "b", "more": [{"\\ud83d": 1}]}'], "line 2 holds half a surrogate pair"),
        ([{"text": "a"}, '{"text": "b", "more": ' + "[" * 101 + "]" * 101 + "}"], "line 2 nests lists and objects"),
        ([{"text": "a"}, '{"text": "b", "more": ' + "[" * 10**5 + "]" * 10**5 + "}"], "line 2 is not JSON"),
        ([{"text": "a"}, '{"text": "b", "more": ' + "1" * 5000 + "}"], "line 2 is not JSON"),
    ],
)
def test_bad_records_are_named_or_left_out_and_counted(tmp_path, rows, complaint, capsys):
    with pytest.raises(GraftError, match=rf"{complaint}.*data\.on_error=skip"):
        read_documents(jsonl(tmp_path / "a.jsonl", *rows))
    kept = read_documents(jsonl(tmp_path / "a.jsonl", *rows, {"text": "c"}, on_error="skip"))
    assert [document.text for document in kept] == ["a", "c"]
    said = capsys.readouterr().out
    assert "left out 1 of 3 records" in said
    assert re.search(complaint, said)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "blank.txt").write_text("  \n")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    for name, complaint in [
        ("empty.jsonl", "is empty"),
        ("latin.txt", "latin.txt is not UTF-8"),
        ("blank.txt", "holds no text"),
        ("none.jsonl", "does not exist"),
        ("torn.parquet", r"cannot read .*torn\.parquet"),
    ]:
        with pytest.raises(GraftError, match=complaint):
            read_documents(DataConfig(path=str(tmp_path / name)))


def test_repeated_records_are_one_document(tmp_path):
    assert len(read_documents(jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}, {"text": "a"}))) == 2
    named = {"id": 1, "text": "a"}, {"id": "1", "text": "a"}, {"id": 2, "text": "a"}
    assert [document.id for document in read_documents(jsonl(tmp_path / "a.jsonl", *named))] == ["1", "2"]


def test_different_records_with_one_id_are_kept_apart_and_in_one_split(tmp_path):
    """Shards are often numbered from 0 each, and some sets give one id to all answers to a question."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in "ab":
        jsonl(shards / f"{shard}.jsonl", *({"id": n, "text": f"{shard} {n}"} for n in range(20)))
    config = DataConfig(path=str(shards), evaluation_share=0.3, calibration_share=0.3)
    documents = list(read_documents(config))
    assert [document.text for document in documents] == [f"{shard} {n}" for shard in "ab" for n in range(20)]
    assert len({document.id for document in documents}) == 40
    assert [document.id for document in documents] == [document.id for document in read_documents(config)]
    for first, second in zip(documents[:20], documents[20:], strict=True):
        assert second.id.startswith(f"{first.id}:")
        assert first.split == second.split
    assert len({document.split for document in documents}) == 3


def test_a_name_does_not_depend_on_the_order_of_fields(tmp_path):
    """A table has one order for all its rows."""
    turned = [dict(reversed(turn.items())) for turn in CHAT]
    one, other = (read_documents(jsonl(tmp_path / "a.jsonl", {"messages": turns}))[0] for turns in (CHAT, turned))
    assert one.id == other.id


def test_ids_that_are_blank_or_no_names_are_none(tmp_path):
    rows = [{"id": identity, "text": text} for identity, text in [("", "a"), (" ", "b"), (1.5, "c"), ([1], "d")]]
    assert all(document.id.startswith("sha256:") for document in read_documents(jsonl(tmp_path / "a.jsonl", *rows)))


def test_a_table_may_have_made_floats_of_ids(tmp_path):
    one, other = read_documents(jsonl(tmp_path / "a.jsonl", {"id": 1, "text": "a"}, {"id": 1.0, "text": "b"}))
    assert one.id == "1"
    assert other.id.startswith("1:")
    assert one.split == other.split


def test_several_answers_to_one_question_are_in_one_split(tmp_path):
    """Without ids: the target would answer it in training, and be measured on it."""
    rows = [{"prompt": f"why {n}", "completion": answer} for answer in ("x", "y", "z") for n in range(20)]
    rows += [{"messages": [{"role": "user", "content": f"why {n}"}]} for n in range(20)]
    config = jsonl(tmp_path / "a.jsonl", *rows, evaluation_share=0.3, calibration_share=0.3)
    documents = list(read_documents(config))
    assert len({document.id for document in documents}) == 80
    splits = [document.split for document in documents]
    assert splits[:20] == splits[20:40] == splits[40:60] == splits[60:]
    assert len(set(splits)) == 3


def test_a_directory_is_read_without_hidden_and_empty_files(tmp_path):
    for name, text in {"b/x.py": "b", "a.py": "a", ".git/c.py": "c", "d.py": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [document.id for document in read_documents(DataConfig(path=str(tmp_path)))] == ["a.py", "b/x.py"]
    assert len(read_documents(DataConfig(path=str(tmp_path), limit=1))) == 1


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_parquet_and_json_hold_what_jsonl_holds(tmp_path, kind):
    rows = [
        {"messages": [*CHAT, {"role": "user", "content": "why", "name": "ann"}], "tools": [tool("f", "city")]},
        {"messages": [CHAT[0], call("f", city="Paris", near={"km": 2})], "tools": [tool("f", "city"), tool("g", "x")]},
        {"messages": [CHAT[0], call("g", x="1"), CHAT[1]], "tools": None},
        {"messages": [CHAT[0], call("h")]},
    ]
    lines = read_documents(jsonl(tmp_path / "a.jsonl", *rows))
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    else:
        (tmp_path / "a.json").write_text(json.dumps(rows))
    table = read_documents(DataConfig(path=str(tmp_path / f"a.{kind}")))
    assert [document.conversation for document in table] == [document.conversation for document in lines]
    assert table[0].conversation.tools == (tool("f", "city"),)
    assert table[2].conversation.messages[1] == call("g", x="1")
    assert [document.id for document in table] == [document.id for document in lines]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_that_datasets_loads_by_name(tmp_path, streaming, monkeypatch):
    repository = tmp_path / "org" / "chats"
    repository.mkdir(parents=True)
    jsonl(repository / "train.jsonl", {"messages": CHAT})
    jsonl(repository / "test.jsonl", *({"messages": [{"role": "user", "content": str(n)}]} for n in range(5)))
    load = datasets.load_dataset  # a Hub id is loaded in the same way as a directory
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: load(str(tmp_path / path), **options))
    config = DataConfig(path="org/chats", hub_split="test", limit=3, streaming=streaming)
    found = [document.conversation.messages[0]["content"] for document in read_documents(config)]
    assert found == ["0", "1", "2"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_set_of_json_on_the_hub_is_read_as_the_file_itself(tmp_path, streaming, monkeypatch):
    """Earlier versions of `datasets` fail at values of two types, and make dates of strings."""
    rows = [{"id": number, "messages": [CHAT[0], call("f", at=value)]} for number, value in enumerate([1, "noon"])]
    rows += [{"id": "x", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}]
    dates = [{"messages": [CHAT[0], call("f", at=value)]} for value in ("2024-01-01", "2024-01-01T00:00:00Z")]
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: load(str(tmp_path / path), **options))
    for name, records in {"types": rows, "dates": dates}.items():
        (tmp_path / "org" / name).mkdir(parents=True)
        own = read_documents(jsonl(tmp_path / "org" / name / "train.jsonl", *records))
        hub = read_documents(DataConfig(path=f"org/{name}", limit=9, streaming=streaming))
        assert [document.conversation for document in hub] == [document.conversation for document in own]


def test_sets_that_nobody_has_are_named():
    with pytest.raises(GraftError, match="nobody/nothing is no path here, and `datasets` cannot load it"):
        read_documents(DataConfig(path="nobody/nothing"))


def test_several_sources_may_number_alike_and_share_records(tmp_path):
    jsonl(tmp_path / "a.jsonl", {"id": 1, "text": "a"}, {"text": "same"})
    jsonl(tmp_path / "b.jsonl", {"id": 1, "text": "b"}, {"text": "same"})
    config = DataConfig(sources=[Source(path=str(tmp_path / f"{name}.jsonl")) for name in "ab"])
    documents = read_documents(config)
    assert [(document.text, document.source) for document in documents] == [("a", 0), ("same", 0), ("b", 1)]
    assert documents[0].id != documents[2].id
    assert documents[0].split == documents[2].split
    jsonl(tmp_path / "b.jsonl", {"text": "same"})
    with pytest.raises(GraftError, match=r"b\.jsonl holds no text that an earlier source does not hold"):
        read_documents(config)


def test_only_places_are_held(tmp_path):
    path = tmp_path / "a.jsonl"
    documents = read_documents(jsonl(path, {"text": "one"}, {"text": "two"}))
    path.write_text(path.read_text().replace("two", "six"))
    assert documents[1].text == "six"
    assert [document.text for document in documents[1:]] == ["six"]


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


def test_settings_notice_changed_contents_and_sources(tmp_path):
    config = jsonl(tmp_path / "a.jsonl", {"text": "a"})
    before = document_settings(config)
    assert document_settings(config) == before
    weighted = DataConfig(sources=[Source(path=config.path, weight=2.0)])
    assert document_settings(weighted) != before
    jsonl(tmp_path / "a.jsonl", {"text": "b"})
    assert document_settings(config) != before


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"on_error": "ignore"}, "choose raise or skip"),
        ({"streaming": True}, "data.limit"),
        ({"limit": 0}, "at least 1"),
    ],
)
def test_bad_settings_are_named(settings, complaint):
    with pytest.raises(GraftError, match=complaint):
        DataConfig(**settings)
    with pytest.raises(GraftError, match="weight of the source x must be positive"):
        Source(path="x", weight=0)
