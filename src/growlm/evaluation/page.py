"""Page: what reports have in common: one web page that needs nothing but itself, with its numbers in files beside it.

Knows headings, tables and figures; not what they are about. Texts come from users: each is escaped, and the page
forbids itself to load anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from growlm.disk.files import write_atomic
from growlm.errors import ConfigError
from growlm.evaluation import plots

PAGE = "index.html"
_TEMPLATE = Path(__file__).with_name("report.html")
_ZERO = ' class="zero"'
# What a kill may leave of `write_atomic` and `check_folder`.
_LEFTOVER = re.compile(r"\.writable|\..+-[0-9a-f]{8}")


def check_folder(out_dir: Path, file: str) -> None:
    """Makes a report's folder, before the work that it is for.

    Args:
        file: that a report of this kind has beside its page.

    Raises ConfigError when it cannot be written, or holds something else than such a report.
    """
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        held = {path.name for path in out_dir.iterdir() if not _LEFTOVER.fullmatch(path.name)}
        if held and file not in held:
            raise ConfigError(f"report: {out_dir} holds something else than a report; choose another folder")
        write_atomic(out_dir / ".writable", b"")
        (out_dir / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"report: cannot write to {out_dir}: {error.strerror}; choose another folder") from error


def write(out_dir: Path, drawn: str, files: Mapping[str, str]) -> Path:
    """Writes a page into `out_dir`, made if needed, and the files beside it; returns the page's path.

    All are replaced whole, the page last, so a page always has its numbers beside it.

    Raises ConfigError when `out_dir` cannot be written, and StoreError when its disk is full.
    """
    out_dir = Path(out_dir)
    try:
        for name, content in files.items():
            write_atomic(out_dir / name, content.encode())
        # A lone surrogate in a sample becomes "?".
        write_atomic(out_dir / PAGE, drawn.encode("utf-8", "replace"))
    except OSError as error:
        raise ConfigError(f"report: cannot write: {error}; choose another folder") from error
    return out_dir / PAGE


def page(title: str, body: Iterable[str], file: str) -> str:
    """
    Args:
        file: beside the page, with its numbers in full.
    """
    light, dark = (
        " ".join(f"--{role}: {colour};" for role, colour in colours.items()) for colours in (plots.LIGHT, plots.DARK)
    )
    template = Template(_TEMPLATE.read_text("utf-8"))
    return template.substitute(title=escape(title), light=light, dark=dark, body="\n".join(body), file=file)


def svg(figure: Figure, name: str, alt: str) -> str:
    return plots.to_svg(figure, name, f"{alt}. The table that follows has the numbers.")


def section(title: str, text: str, figures: Sequence[str], table: str) -> str:
    drawn = "".join(f'<figure class="scroll" tabindex="0">{figure}</figure>' for figure in figures)
    drawn = f'<div class="figures">{drawn}</div>' if drawn else ""
    body = f'<div class="pair">{drawn}{table}</div>'
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{body}</section>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    columns = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in head)
    lines = ""
    for first, *rest in rows:
        cells = "".join(f"<td{_ZERO * (cell == '0')}>{escape(cell)}</td>" for cell in rest)
        lines += f'<tr><th scope="row"><span>{escape(first)}</span></th>{cells}</tr>\n'
    name, wide = escape(caption), " wide" * (len(head) > 8)
    return (f'<div class="scroll table{wide}" role="region" tabindex="0" aria-label="{name}"><table>'
            f"<caption>{name}</caption><thead><tr>{columns}</tr></thead>\n<tbody>{lines}</tbody>"
            "</table></div>")  # fmt: skip
