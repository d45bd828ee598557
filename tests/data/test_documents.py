"""Reading documents from every kind of source, and refusing what cannot be read."""

import gzip
import json
import sys
import types

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from loglinear.data import Documents, standard_library


def texts(*arguments, **options):
    return [document.text for document in Documents(*arguments, **options)]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_text_file_and_directory(tmp_path):
    (tmp_path / "b.txt").write_text("second\r\nline")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.py").write_text("third")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "d.txt").write_text("never")
    assert texts(tmp_path / "a.md") == ["first"]
    assert texts(tmp_path) == ["first", "second\r\nline", "third"]
    assert texts([tmp_path, tmp_path / "a.md"]) == texts(tmp_path), "a file named twice is read once"


def test_glob(tmp_path):
    for name in ("x1.txt", "x2.txt", "y.txt"):
        (tmp_path / name).write_text(name)
    assert texts(f"{tmp_path}/x*.txt") == ["x1.txt", "x2.txt"]
    assert texts(f"{tmp_path}/**/*.txt") == ["x1.txt", "x2.txt", "y.txt"]


def test_the_source_of_a_package():
    found = Documents("package:jaxtyping")
    assert found.files and all(file.suffix == ".py" and "jaxtyping" in file.parts for file in found.files)
    assert len(Documents(["package:jaxtyping", "package:packaging"]).files) > len(found.files)
    assert not any("tests" in file.parts for file in Documents("package:numpy").files)
    for name in ("no_such_package", "textwrap", ""):
        with pytest.raises(FileNotFoundError, match=f"got package:{name}, wanted an installed Python package"):
            Documents(f"package:{name}")


def test_jsonl_with_a_field_of_choice(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"body": "one", "n": 1}, {"body": None}, {"body": "two"}])
    documents = list(Documents(path, text_field="body"))
    assert [document.text for document in documents] == ["one", "two"]
    assert documents[1].name.endswith("d.jsonl:3")


def test_parquet(tmp_path):
    column = [f"row {number}" for number in range(600)]
    parquet.write_table(arrow.table({"text": column, "other": list(range(600))}), tmp_path / "d.parquet")
    assert texts(tmp_path / "d.parquet") == column


def test_gzip(tmp_path):
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "packed"}\n')
    with gzip.open(tmp_path / "e.txt.gz", "wt") as file:
        file.write("plain")
    assert texts(tmp_path) == ["packed", "plain"]


def test_bad_bytes_become_replacement_characters(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert texts(tmp_path) == ["caf\ufffd"]


def test_half_characters_in_json_become_replacement_characters(tmp_path):
    """What UTF-8 cannot hold, no tokenizer can read; the two halves of a character are that character."""
    path = tmp_path / "d.jsonl"
    path.write_text(r'{"text": "a\ud800b \ud83d\ude00"}' + "\n")
    assert texts(path) == ["a\ufffdb \U0001f600"]


def test_byte_order_marks_are_not_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "line"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfplain \xef\xbb\xbf")
    assert texts(tmp_path) == ["line", "plain \ufeff"]


def test_limit_and_rereading(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": str(number)} for number in range(5)])
    documents = Documents(path, limit=3)
    assert [d.text for d in documents] == [d.text for d in documents] == ["0", "1", "2"]


def test_reading_is_lazy(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "good"}\nnot json\n')
    assert next(iter(Documents(path))).text == "good"


def test_standard_library_needs_nothing():
    documents = standard_library()
    assert len(documents.files) > 200
    assert next(iter(documents)).name.endswith(".py")
    assert not any("site-packages" in file.parts or "test" in file.parts for file in documents.files)


def test_fingerprint_follows_the_files(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "a"}])
    before = Documents(path).fingerprint()
    assert before == Documents(path).fingerprint()
    assert before != Documents(path, text_field="body").fingerprint()
    assert before != Documents(path, limit=1).fingerprint()
    write_jsonl(path, [{"text": "a"}, {"text": "b"}])
    assert before != Documents(path).fingerprint()


def test_hub_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'log-linear-attention\[data\]'"):
        Documents("hub:owner/corpus")


def test_hub_streams_the_split_that_was_asked_for(monkeypatch):
    calls = []

    def load_dataset(name, subset, *, split, streaming):
        calls.append((name, subset, split, streaming))
        return iter([{"content": "from the hub"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = texts("hub:owner/corpus", text_field="content", hub_subset="en", hub_split="validation")
    assert found == ["from the hub"]
    assert calls == [("owner/corpus", "en", "validation", True)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"txt": "a"}\n', r"d\.jsonl:1: no field 'text', it has 'txt'; did you mean 'txt'\?"),
        ('{"text": "a"}\n{"text": 3}\n', r"d\.jsonl:2: got int in the field 'text', wanted text"),
        ("not json\n", r"d\.jsonl:1: got a line that is not JSON"),
        ("[1]\n", r"d\.jsonl:1: got a JSON list, wanted an object with the field 'text'"),
    ],
    ids=["wrong field", "not text", "broken line", "not an object"],
)
def test_wrong_jsonl_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / "d.jsonl")


def test_wrong_parquet_is_refused(tmp_path):
    parquet.write_table(arrow.table({"body": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match="no field 'text', it has 'body'"):
        texts(tmp_path / "d.parquet")
    (tmp_path / "e.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="not Parquet"):
        texts(tmp_path / "e.parquet")


@pytest.mark.parametrize("name", ["d.txt.gz", "d.jsonl.gz"])
@pytest.mark.parametrize("damage", ["cut off", "not gzip", "changed inside"])
def test_wrong_gzip_is_refused_with_its_name(tmp_path, name, damage):
    whole = gzip.compress(b'{"text": "0123456789"}\n' * 1000)
    changed = whole[:20] + bytes(byte ^ 255 for byte in whole[20:40]) + whole[40:]
    content = {"cut off": whole[: len(whole) // 2], "not gzip": b"plain", "changed inside": changed}[damage]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: got a file that is not gzip, or not all of it"):
        texts(tmp_path / name)


def test_sources_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="wanted an existing file"):
        Documents(tmp_path / "absent.txt")
    with pytest.raises(FileNotFoundError, match="hub:owner/name"):
        Documents("owner/name")
    with pytest.raises(FileNotFoundError, match="matches no file"):
        Documents(f"{tmp_path}/*.txt")
    with pytest.raises(FileNotFoundError, match="holds no file with a known suffix"):
        Documents(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"")
    for source in (tmp_path / "picture.png", f"{tmp_path}/*.png"):
        with pytest.raises(ValueError, match=r"got the suffix '\.png', wanted a known one"):
            Documents(source)
    with pytest.raises(ValueError, match="got no data source"):
        Documents([])
    with pytest.raises(ValueError, match="limit=0"):
        Documents("stdlib", limit=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_field": "body"}, "got text_field='body', but no source has fields; wanted JSONL, Parquet or a hub"),
        ({"hub_subset": "en"}, "got hub_subset='en', but no source is a hub data set; wanted 'hub:OWNER/NAME'"),
        ({"hub_subset": "en", "hub_split": "test"}, "got hub_subset='en', hub_split='test', but no source is"),
    ],
)
def test_options_that_no_source_heeds_are_refused(tmp_path, options, message):
    (tmp_path / "a.txt").write_text("text")
    for source in ("stdlib", tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match=message):
            Documents(source, **options)


def test_options_that_one_source_heeds_are_taken(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"body": "packed"}\n')
    assert texts(tmp_path, text_field="body") == ["plain", "packed"]
    assert texts(tmp_path / "a.txt", text_field="text", hub_subset=None, hub_split="train") == ["plain"]
