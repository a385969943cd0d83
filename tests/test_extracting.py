"""Extracting: pages, PDF and Word files are read by an extra, or refused; their markup is never text."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from growlm.data import read
from growlm.errors import DataError
from growlm.progress import reporting

PAGE = b"<html><head><script>var a = 1;</script></head><body><p>The tenant pays the rent.</p></body></html>"
PACKAGES = {"a.html": "trafilatura", "a.HTM": "trafilatura", "a.pdf": "pypdf", "a.docx": "docx"}


def broken(content: object) -> None:
    raise ValueError("no such\nthing")


def pages(*texts: str) -> SimpleNamespace:
    reader = SimpleNamespace(pages=[SimpleNamespace(extract_text=lambda text=text: text) for text in texts])
    return SimpleNamespace(PdfReader=lambda content: reader)


def paragraphs(*parts: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(Document=lambda content: SimpleNamespace(iter_inner_content=lambda: iter(parts)))


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("as_folder", [True, False])
def test_without_the_extra_it_is_refused(tmp_path, monkeypatch, name, as_folder):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    (tmp_path / "other.txt").write_text("fine")
    (tmp_path / name).write_bytes(PAGE)
    with pytest.raises(DataError) as caught:
        read([tmp_path if as_folder else tmp_path / name])
    assert name in str(caught.value)
    assert 'pip install "growlm[documents]"' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_extracted_is_read_and_what_is_left_out_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trafilatura", SimpleNamespace(extract=lambda page, **_: "The tenant\n\npays."))
    monkeypatch.setitem(sys.modules, "pypdf", pages("Page one.", " ", "Page three."))
    rows = [SimpleNamespace(cells=[SimpleNamespace(text="room"), SimpleNamespace(text="7")])]
    word = paragraphs(SimpleNamespace(text="A title"), SimpleNamespace(text=" "), SimpleNamespace(rows=rows))
    monkeypatch.setitem(sys.modules, "docx", word)
    for name in ("a.html", "b.pdf", "c.docx"):
        (tmp_path / name).write_bytes(PAGE + b"\0")
    with reporting("law", True):
        body = read([tmp_path])
    assert [d.text for d in body.documents] == ["The tenant\n\npays.", "Page one.\n\nPage three.", "A title\n\nroom\t7"]
    assert [source.bytes for source in body.sources] == [len(PAGE) + 1] * 3
    assert [line for line in capsys.readouterr().err.splitlines() if "left out" in line] == [
        f"law: 1 HTML file: 17 characters of text; left out: markup, scripts, menus and what else surrounds it, of "
        f"{len(PAGE) + 1} bytes in all",
        "law: 1 PDF file: 22 characters of text; left out: pictures, and 1 of 3 pages, which have no text",
        "law: 1 Word file: 15 characters of text; left out: pictures, headers and footers, notes and comments",
    ]
    assert [d.text for d in read([tmp_path / "a.html"], separator="\n\n").documents] == ["The tenant", "pays."]


def test_files_without_text_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trafilatura", SimpleNamespace(extract=lambda page, **_: None))
    for name in ("a.html", "b.htm"):
        (tmp_path / name).write_bytes(PAGE)
    with reporting("law", True), pytest.raises(DataError, match="no text in"):
        read([tmp_path])
    assert "2 HTML files: 0 characters" in (told := capsys.readouterr().err)
    assert "; 2 without any text" in told


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdf", SimpleNamespace(PdfReader=broken))
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match=r"a\.pdf: cannot be read as PDF \(no such thing\); give its text as \.txt$"):
        read([tmp_path])


# With the packages themselves, where they are installed


def test_a_page_gives_its_text_alone(tmp_path):
    pytest.importorskip("trafilatura")
    (tmp_path / "a.html").write_bytes(PAGE)
    assert read([tmp_path]).documents[0].text.strip() == "The tenant pays the rent."


def test_a_word_file_gives_paragraphs_and_tables_in_order(tmp_path):
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.add_paragraph("First.")
    document.add_table(1, 2).cell(0, 1).text = "7"
    document.add_paragraph("Last.")
    document.save(tmp_path / "a.docx")
    assert read([tmp_path]).documents[0].text == "First.\n\n\t7\n\nLast."


def test_pages_of_a_pdf_without_text_are_no_document(tmp_path):
    pypdf = pytest.importorskip("pypdf")
    writer, content = pypdf.PdfWriter(), io.BytesIO()
    writer.add_blank_page(100, 100)
    writer.write(content)
    (tmp_path / "a.pdf").write_bytes(content.getvalue())
    with pytest.raises(DataError, match="no text in"):
        read([tmp_path])
