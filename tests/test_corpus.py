"""Documents of every source, one after another, and what is passed over."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hcache_rag import SourceError
from hcache_rag.corpus import Corpus, Document, documents_of
from hcache_rag.sources import read_folder

HTML = b"""<html><head><title>Mars</title><style>p { color: red }</style></head>
<body><script>var x = 1;</script><h1>Mars</h1><p>The red <b>planet</b>.</p></body></html>"""


def pdf(text: str) -> bytes:
    """A PDF file of one page with a line of text, written by hand."""
    content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return data + (
        b"xref\n0 6\n0000000000 65535 f \n%strailer\n<< /Size 6 /Root 1 0 R >>\n" % table
        + b"startxref\n%d\n%%%%EOF" % len(data)
    )


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, column: str = "text") -> tuple[list[Document], list[tuple[str, str]]]:
    """Documents, and what was passed over; the count is that of both."""
    skipped: list[tuple[str, str]] = []
    corpus = Corpus(path, column)
    documents = list(corpus.documents(lambda name, reason: skipped.append((name, reason))))
    assert corpus.count() == len(documents) + len(skipped)
    return documents, skipped


def test_a_folder_holds_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# B")
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "c.bin").write_bytes(b"\0")
    assert read(tmp_path) == (
        [Document("a.txt", "A"), Document("b.md", "# B")],
        [("c.bin", "binary")],
    )


def test_html_is_what_a_page_shows(tmp_path: Path) -> None:
    (tmp_path / "mars.html").write_bytes(HTML)
    ((document,), skipped) = read(tmp_path)
    assert document.text.split("\n") == ["Mars", "Mars", "The red", "planet", "."]
    assert not skipped
    assert read_folder(tmp_path).files[0].text == document.text


def test_pdf_is_read_and_damage_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf("Saturn has rings."))
    (tmp_path / "b.pdf").write_bytes(pdf("Saturn has rings.")[:40])
    (tmp_path / "c.pdf").write_bytes(b"no PDF at all")
    documents, skipped = read(tmp_path)
    assert documents == [Document("a.pdf", "Saturn has rings.")]
    assert [name for name, _ in skipped] == ["b.pdf", "c.pdf"]


@pytest.mark.parametrize(("suffix", "module"), [("pdf", "pypdf"), ("html", "bs4")])
def test_without_its_reader_a_file_is_passed_over_with_advice(
    suffix: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(b"text")
    monkeypatch.setitem(sys.modules, module, None)
    _, ((_, reason),) = read(tmp_path)
    assert "pip install 'hcache-rag[readers]'" in reason


def test_json_lines_are_read_row_by_row(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": " "}, {"other": 1}, ["no row"], {"text": 7}, {"text": "two"}]
    path = write_lines(tmp_path / "rows.jsonl", list(rows))
    with path.open("a") as file:
        file.write("\n{broken\n")
    documents, skipped = read(path)
    assert documents == [Document("rows.jsonl:1", "one"), Document("rows.jsonl:6", "two")]
    assert [reason for _, reason in skipped] == [
        "empty",
        "no text in 'text'",
        "no text in 'text'",
        "no text in 'text'",
        "not a line of JSON",
    ]


def test_a_wrong_column_is_an_error_not_an_empty_corpus(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"body": "one"}, {"body": "two"}])
    assert [d.text for d in read(path, "body")[0]] == ["one", "two"]
    with pytest.raises(SourceError, match="no row has a text in 'text'"):
        read(path)


def test_parquet_is_read_column_by_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"passage": ["one", None, "", "two"], "id": [1, 2, 3, 4]})
    parquet.write_table(table, path)
    documents, skipped = read(path, "passage")
    assert documents == [Document("rows.parquet:1", "one"), Document("rows.parquet:4", "two")]
    assert [reason for _, reason in skipped] == ["no text in 'passage'", "empty"]
    with pytest.raises(SourceError, match=r"no column 'text'; it has \['passage', 'id'\]"):
        read(path)
    (tmp_path / "no.parquet").write_text("no table")
    with pytest.raises(SourceError, match="is not a Parquet file"):
        read(tmp_path / "no.parquet")


def test_without_pyarrow_parquet_is_an_error_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SourceError, match=r"pip install 'hcache-rag\[parquet\]'"):
        read(tmp_path / "rows.parquet")


def test_a_folder_may_mix_them(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", [{"text": "B1"}, {"text": "B2"}])
    (tmp_path / "a.txt").write_text("A")
    assert [d.text for d in read(tmp_path)[0]] == ["A", "B1", "B2"]


def test_no_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file or folder"):
        Corpus(tmp_path / "missing")


def test_texts_are_numbered_and_documents_keep_their_names() -> None:
    named = Document("mine", "B")
    assert list(documents_of(["A", named])) == [Document("0", "A"), named]
