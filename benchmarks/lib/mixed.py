"""A domain of mixed form: paragraphs of reports, tables of numbers, and questions about these tables.

Made of the data sets that the package statsmodels carries, each with its description and its table; no model.
"""

from __future__ import annotations

import ast
import csv
import io
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

FORMS = ("paragraphs", "tables", "questions")
_ROWS = 12  # of a table in one document
_TABLES, _QUESTIONS = 12, 40  # of a data set at the most
_TEXTS = ("TITLE", "SOURCE", "DESCRSHORT", "DESCRLONG", "NOTE")
_ASKED = (
    "What is {column} where {key} is {value}?",
    "In {title}: how large is {column} for {key} {value}?",
    "Which value has {column} in the row of {key} {value}, in {title}?",
    "{title}, {key} {value}: what is the {column}?",
)


def documents(seed: int = 0) -> dict[str, dict[str, list[str]]]:
    """Of each data set, by its name, the texts of each of `FORMS`, shuffled.

    Raises:
        SystemExit: statsmodels is not installed.
    """
    spec = find_spec("statsmodels")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit('mixed forms: the data sets are in a package: pip install "statsmodels"')
    draw = random.Random(seed)
    found: dict[str, dict[str, list[str]]] = {}
    for folder in sorted((Path(spec.submodule_search_locations[0]) / "datasets").iterdir()):
        tables = sorted(folder.glob("*.csv"))
        if not tables or not (folder / "data.py").exists():
            continue
        title, paragraphs = _described(folder / "data.py")
        rows = _rows(tables[0])
        of_forms = (paragraphs, list(_tables(title, rows, draw)), list(_questions(title, rows, draw)))
        found[folder.name] = dict(zip(FORMS, of_forms, strict=True))
        for texts in of_forms:
            draw.shuffle(texts)
    return found


def _described(path: Path) -> tuple[str, list[str]]:
    """Title and paragraphs of a data set."""
    tree = ast.parse(path.read_text())
    said = {"TITLE": ast.get_docstring(tree) or path.parent.name}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            said |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    title = " ".join(said["TITLE"].split())
    found = []
    for text in (said[name] for name in _TEXTS[1:] if name in said):
        found.append("\n".join([title, *(line.strip() for line in text.split("\n") if line.strip())]))
    return title, [text for text in dict.fromkeys(found) if len(text) > 80]


def _rows(path: Path) -> list[list[str]]:
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    delimiter = "\t" if "\t" in text.split("\n", 1)[0] else ","
    return [
        [cell.strip("' ") for cell in row][:10] for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row
    ]


def _tables(title: str, rows: list[list[str]], draw: random.Random) -> Iterator[str]:
    header, body = rows[0], rows[1:]
    starts = list(range(0, len(body), _ROWS))
    for start in draw.sample(starts, min(len(starts), _TABLES)):
        yield "\n".join([title, *(" | ".join(row) for row in [header, *body[start : start + _ROWS]])])


def _questions(title: str, rows: list[list[str]], draw: random.Random) -> Iterator[str]:
    header, body = rows[0], rows[1:]
    if len(header) < 2:
        return
    for row in draw.sample(body, min(len(body), _QUESTIONS)):
        column = draw.randrange(1, min(len(header), len(row)))
        asked = draw.choice(_ASKED).format(title=title, key=header[0], value=row[0], column=header[column])
        yield f"{asked}\n{row[column]}"
