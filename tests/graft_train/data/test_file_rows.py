"""What a file holds is told by its content, and a record is the same in every kind of file."""

import gzip
import json

import datasets
import pyarrow
import pytest

from graft_inference.errors import GraftError
from graft_train.config.data import DataConfig
from graft_train.data.documents import read_documents


def chat(number):
    return {"messages": [{"role": "user", "content": f"why {number} é"}, {"role": "assistant", "content": "so"}]}


CHATS = [chat(number) for number in range(4)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in CHATS)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
OTHER = '{"text": "other"}\n'


def packed(content):
    return gzip.compress(content, mtime=0)  # the time would be in the names of tests


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, **settings):
    return read_documents(DataConfig(path=str(path), **settings))


def asked(documents):
    return [document.conversation.messages[0]["content"] for document in documents]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.txt", "a.jsonl.txt", "a", "a.jsonl.gz", "a.gz"])
@pytest.mark.parametrize("kind", ["lines", "array", "pretty array", "marked"])
def test_json_is_read_whatever_its_name(tmp_path, name, kind):
    content = {
        "lines": LINES,
        "array": json.dumps(CHATS),
        "pretty array": " \n" + json.dumps(CHATS, indent=2, ensure_ascii=False),
        "marked": "\ufeff" + LINES.replace("\n", "\r\n"),
    }[kind].encode()
    documents = read(write(tmp_path / name, packed(content) if name.endswith(".gz") else content))
    assert asked(documents) == [f"why {number} é" for number in range(4)]
    assert asked(documents[::-1]) == asked(documents)[::-1]
    assert documents[2].place == f"{tmp_path / name}, {'row' if 'array' in kind else 'line'} 3"


@pytest.mark.parametrize("name", ["a.json", "a.txt"])
def test_one_object_over_several_lines_is_one_record(tmp_path, name):
    (document,) = read(write(tmp_path / name, json.dumps(chat(1), indent=2)))
    assert asked([document]) == ["why 1 é"]


def test_a_damaged_first_line_costs_only_itself(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES[:20] + "\n" + LINES)
    with pytest.raises(GraftError, match="line 1 is not JSON"):
        read(path)
    assert len(read(path, on_error="skip")) == 4


def test_arrays_are_read_from_the_disk_again(tmp_path):
    path = write(tmp_path / "a.json", json.dumps(CHATS, ensure_ascii=False))
    documents = read(path)
    path.write_text(path.read_text().replace("why 2", "who 2"))
    assert asked(documents[2:3]) == ["who 2 é"]


def test_a_bad_element_of_an_array_costs_only_itself(tmp_path):
    array = json.dumps([chat(0), {"text": "x"}, 3, chat(1)]).replace('"x"', "NaN")
    path = write(tmp_path / "a.json", array)
    with pytest.raises(GraftError, match=r"a\.json, row 2 is not JSON: NaN"):
        read(path)
    assert asked(read(path, on_error="skip")) == ["why 0 é", "why 1 é"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", json.dumps(CHATS)[:-20], r"a\.json, row 4 is not JSON"),
        ("a.json", json.dumps(CHATS)[:-1], r"a\.json: neither a comma nor the array's end follows row 4"),
        ("a.json", json.dumps(CHATS) + OTHER, r"a\.json: something follows the array's end"),
        ("a.json", "[1]", r"a\.json, row 1 is not a JSON object with one of the fields"),
        ("a.json", b'[{"text": "caf\xe9"}]', r"a\.json is not UTF-8 \(byte 14\)"),
        ("a.json", json.dumps(chat(0), indent=2)[:-1], r"a\.json is not JSON"),
        ("a.json", '"x"\n', r"a\.json, line 1 is not a JSON object"),
        ("a.jsonl", LINES.encode("utf-16"), "line 1 is not UTF-8"),
        ("a.jsonl.gz", packed(LINES.encode())[:-12], r"a\.jsonl\.gz cannot be read"),
        ("a.py.gz", packed(b"x = 1"), r"a\.py\.gz is compressed.*unpack it"),
        ("a.csv", "prompt,answer\na,b\n", r"a\.csv is a CSV table.*convert it to JSONL"),
        ("a.csv.gz", packed(b"prompt,answer\na,b\n"), r"a\.csv\.gz is a CSV table"),
        ("a.jsonl.gz", packed(b"{oops\n" + OTHER.encode()), r"a\.jsonl\.gz, line 1 is not JSON"),
        ("a.TSV", "prompt\tanswer\na\tb\n", r"a\.TSV is a CSV table"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x00", r"a\.jsonl\.zst is binary"),
        ("a.txt", "prose".encode("utf-16-le"), r"a\.txt is binary"),
        ("a.txt", "x" * 9999 + "\0", r"a\.txt is binary"),
        ("a.arrow", b"ARROW1\0\0", r"cannot read .*a\.arrow"),
        ("a.parquet", POINTER, r"a\.parquet is a pointer of git-lfs.*git lfs pull"),
        ("a.jsonl", POINTER, r"a\.jsonl is a pointer of git-lfs"),
        ("a.parquet", "<!DOCTYPE html><html>", r"a\.parquet is neither Parquet nor Arrow"),
        ("a.ARROW", b"\0\0\0", r"a\.ARROW is neither Parquet nor Arrow"),
        ("a.parquet.gz", packed(b"PAR1"), r"a\.parquet\.gz is compressed.*unpack it"),
        ("caf\udce9.txt", "x", r"caf\\udce9\.txt' is not UTF-8; rename it"),
    ],
)
def test_what_is_damaged_or_unknown_is_named(tmp_path, name, content, complaint):
    path = write(tmp_path / name, content)
    with pytest.raises(GraftError, match=complaint):
        read(path)


@pytest.mark.parametrize(("name", "content"), [("a.txt", "text"), ("a.jsonl", OTHER)])
def test_what_is_not_read_is_named_in_a_directory_too(tmp_path, name, content):
    write(tmp_path / name, content)
    write(tmp_path / "b.csv", "prompt\na\n")
    write(tmp_path / "c.png", b"\x89PNG\0")
    with pytest.raises(GraftError, match=r"b\.csv is a CSV table.*data\.glob.*data\.on_error=skip"):
        read(tmp_path)
    assert [document.text.strip() for document in read(tmp_path, on_error="skip")] in (["text"], ["other"])


@pytest.mark.parametrize(
    "text",
    [
        "[section]\nkey = 1\n", "{% if x %}", "[1] a note", "{ pkgs }: x", "42\n",
        "[] one\n[] two\n", "[{foo}](bar)", "[ { not json", "[]()",
    ],
)  # fmt: skip
def test_text_that_begins_like_json_is_text(tmp_path, text):
    (document,) = read(write(tmp_path / "a.txt", text))
    assert document.text == text


def test_text_has_no_byte_order_mark(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbftext"))[0].text == "text"


def test_tables_are_read_whatever_their_name(tmp_path):
    table = datasets.Dataset.from_list(CHATS)
    table.to_parquet(tmp_path / "a.data")
    assert asked(read(tmp_path / "a.data")) == [f"why {number} é" for number in range(4)]
    columns = pyarrow.table({"text": ["a", "b"]})
    with pyarrow.ipc.new_file(tmp_path / "b.arrow", columns.schema) as file:
        file.write_table(columns)
    assert [document.text for document in read(tmp_path / "b.arrow")] == ["a", "b"]


def test_json_in_a_table_is_checked_as_well(tmp_path):
    nested = datasets.Features({"text": datasets.Value("string"), "more": datasets.Json()})
    rows = {"text": ["a", "b"], "more": [[], json.loads("[" * 101 + "]" * 101)]}
    datasets.Dataset.from_dict(rows, features=nested).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(GraftError, match=r"a\.parquet, row 2 nests lists and objects"):
        read(tmp_path / "a.parquet")


def test_a_table_that_breaks_on_the_way_is_named(tmp_path):
    broken = pyarrow.StringArray.from_buffers(
        1, pyarrow.array([0, 1], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff")
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(GraftError, match=r"`datasets` cannot read .*a\.parquet, row 1"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "saved", [datasets.Dataset.from_list, lambda rows: datasets.DatasetDict(train=datasets.Dataset.from_list(rows))]
)
def test_a_set_that_was_saved_to_the_disk(tmp_path, saved):
    saved(CHATS).save_to_disk(tmp_path / "saved")
    assert asked(read(tmp_path / "saved")) == [f"why {number} é" for number in range(4)]


def test_a_directory_of_records_has_cards_beside_them(tmp_path):
    write(tmp_path / "set/README.md", "---\nlicense: mit\n---\n# Chats")
    write(tmp_path / "set/LICENSE", "MIT")
    write(tmp_path / "set/README_zh.md", "# Chats")
    write(tmp_path / "set/dataset_infos.json", '{"default": {}}')
    write(tmp_path / "set/.gitattributes", "x")
    write(tmp_path / "set/_SUCCESS", "")
    write(tmp_path / "set/data/a.json", json.dumps(CHATS[:2]))
    write(tmp_path / "set/data/b.json", json.dumps(CHATS[2:]))
    write(tmp_path / "set/data/c.jsonl.gz", packed(OTHER.encode()))
    documents = read(tmp_path / "set")
    assert asked(documents[:4]) == [f"why {number} é" for number in range(4)]
    assert [document.text for document in documents[4:]] == ["other"]


def test_a_directory_of_text_has_its_readme_as_well(tmp_path):
    write(tmp_path / "README.md", "read me")
    write(tmp_path / "a.py", "x = 1")
    assert [document.id for document in read(tmp_path)] == ["README.md", "a.py"]


def test_records_and_text_are_not_mixed(tmp_path):
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "notes.md", "notes")
    named = r"records \(.*a\.jsonl\) and text \(.*notes\.md\).*data\.glob='\*\*/\*\.jsonl' or data\.glob='\*\*/\*\.md'"
    with pytest.raises(GraftError, match=named):
        read(tmp_path)
    assert len(read(tmp_path, glob="*.jsonl")) == 4
    assert [document.text for document in read(tmp_path, glob="*.md")] == ["notes"]


def test_pointers_in_place_of_a_clones_tables_are_named(tmp_path):
    write(tmp_path / "README.md", "# Chats")
    write(tmp_path / "data/a.parquet", POINTER)
    with pytest.raises(GraftError, match=r"a\.parquet is a pointer of git-lfs"):
        read(tmp_path)


def test_an_empty_array_is_one_whatever_its_name(tmp_path):
    with pytest.raises(GraftError, match="holds no text"):
        read(write(tmp_path / "a.txt", " [ ]\n"))


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", LINES), ("a.json", json.dumps(CHATS)), ("a.py", "text\n")])
def test_a_file_that_vanishes_after_it_was_gone_through_is_named(tmp_path, name, content):
    documents = read(write(tmp_path / name, content))
    (tmp_path / name).unlink()
    with pytest.raises(GraftError, match=f"{tmp_path / name} cannot be read: .*No such file"):
        documents[0]
