"""Text files, JSON lines and Parquet are read as documents; what is bad is named, or skipped and counted."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deltajax.tokenizer import ByteTokenizer
from tests.train.train_common import write_text
from train.corpus import load_corpus
from train.documents import BadData, DataError, expand, read_documents


def read(*paths, bad=None, **options):
    return list(read_documents([str(p) for p in paths], "text", bad or BadData(), **options))


def load(*patterns):
    return load_corpus([str(p) for p in patterns], "text", 0.05, ByteTokenizer())


def test_globs_text_json_lines_and_parquet_mix(tmp_path):
    (tmp_path / "a.txt").write_text("plain text " * 10)
    write_text(tmp_path / "b.jsonl", documents=3)
    pq.write_table(pa.table({"text": ["one", "two"], "other": [1, 2]}), tmp_path / "c.parquet")
    corpus = load_corpus((str(tmp_path / "*"),), "text", 0.1, ByteTokenizer())
    assert corpus.train.num_documents == 6


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"not found: .*nothing\.txt"):
        load(tmp_path / "nothing.txt")


def test_directory_that_is_not_prepared_is_named(tmp_path):
    with pytest.raises(DataError, match=r"is a directory without dataset\.json"):
        expand([str(tmp_path)])


def test_name_with_a_pattern_in_it_is_found(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert expand([str(tmp_path / "a[1].txt")]) == [str(tmp_path / "a[1].txt")]


def test_empty_file_is_named(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty: .*empty\.txt"):
        load(tmp_path / "empty.txt")


@pytest.mark.parametrize(
    "name,why",
    [
        ("a.jsonl.gz", "a .gz file"),
        ("a.JSON", "a .json file"),
        ("a.txt.zst", "a .zst file"),
        ("a.txt", "not text, as it has NUL"),
    ],
)
def test_what_is_not_text_is_named_or_passed_over(tmp_path, name, why):
    (tmp_path / name).write_bytes(b"ab\0cd")
    with pytest.raises(DataError, match=rf"{name}: {why}.*--data\.files"):
        load(tmp_path / name)
    assert not read(tmp_path / name, bad=(bad := BadData("skip"))) and bad.count == 1


def test_suffixes_may_be_in_capitals(tmp_path):
    assert len(read(write_text(tmp_path / "A.JSONL", documents=3))) == 3


def test_file_without_documents_is_named(tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"no documents in .*blank\.jsonl"):
        load(tmp_path / "blank.jsonl")


BAD_LINES = ["{not json", '{"body": "x"}', '["x"]', '{"text": 3}', r'{"text": "\ud83d"}', '{"text": "cut o']


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_json_line_is_named_by_file_and_line(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
        load(path)


def test_parquet_rows_are_documents_named_by_row(tmp_path):
    texts = [f"document {i}" for i in range(1000)]
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        pq.write_table(pa.table({"text": pa.array(texts, kind)}), tmp_path / "a.parquet", row_group_size=300)
        documents = read(tmp_path / "a.parquet")
        assert [d.text.decode() for d in documents] == texts
        assert documents[299].name.endswith("a.parquet:300")


def write_bad_parquet(path, what):
    if what == "no column":
        pq.write_table(pa.table({"body": ["x"]}), path)
    elif what == "numbers":
        pq.write_table(pa.table({"text": [1, 2]}), path)
    elif what == "no rows":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    elif what == "null":
        pq.write_table(pa.table({"text": ["a", None]}), path)
    else:
        pq.write_table(pa.table({"text": [str(i) * 50 for i in range(1000)]}), path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if what == "cut" else b"not parquet")


BAD_PARQUET = {
    "no column": r"bad\.parquet: no column 'text' \(found: body\)",
    "numbers": r"bad\.parquet: column 'text' holds int64, not text",
    "no rows": r"empty: .*bad\.parquet",
    "null": r"bad\.parquet:2: no text in column 'text' \(null\)",
    "cut": r"bad\.parquet: cannot be read as Parquet after row 0",
    "other": r"bad\.parquet: cannot be read as Parquet after row 0",
}


@pytest.mark.parametrize("what", BAD_PARQUET)
def test_bad_parquet_is_named(tmp_path, what):
    write_bad_parquet(tmp_path / "bad.parquet", what)
    with pytest.raises(DataError, match=BAD_PARQUET[what]):
        read(tmp_path / "bad.parquet")


def test_bad_data_is_skipped_and_counted_on_request(tmp_path):
    good = [f"good {i}" for i in range(len(BAD_LINES))]
    lines = [
        x for line, text in zip(BAD_LINES, good, strict=True) for x in (line, json.dumps({"text": text}))
    ]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    (tmp_path / "empty.txt").touch()
    for i, what in enumerate(BAD_PARQUET):
        write_bad_parquet(tmp_path / f"{i}.parquet", what)
    bad = BadData("skip")
    documents = read(*sorted(tmp_path.iterdir()), bad=bad)
    assert [d.text.decode() for d in documents] == ["a", *good]  # "a" stands before the null
    assert bad.count == len(BAD_LINES) + 1 + len(BAD_PARQUET)
    assert bad.summary().startswith(f"skipped {bad.count} bad records: ") and bad.summary().endswith("; ...")
    assert len(bad.messages) == 3


def test_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read \(No such file"):
        read(tmp_path / "gone.jsonl")


def test_long_text_is_cut_at_line_ends_on_request(tmp_path):
    text = "".join(f"line {i}\n" for i in range(5000)).encode()
    (tmp_path / "long.txt").write_bytes(text)
    parts = read(tmp_path / "long.txt", max_text_bytes=1000)
    assert b"".join(d.text for d in parts) == text and len(parts) > 30
    assert all(d.text.endswith(b"\n") and len(d.text) < 1100 for d in parts)
    assert len(read(tmp_path / "long.txt", max_text_bytes=10**6)) == 1


def test_progress_adds_up_to_the_size_of_the_files(tmp_path):
    write_text(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("text\n" * 1000)
    pq.write_table(pa.table({"text": [str(i) for i in range(1000)]}), tmp_path / "c.parquet")
    sizes: list[int] = []
    read(*sorted(tmp_path.iterdir()), progress=sizes.append, max_text_bytes=100)
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert sum(sizes) == pytest.approx(total, abs=10)  # Parquet's are in proportion to its rows
