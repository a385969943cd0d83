"""Writes docs/serving/openapi.json, what a server says of itself at /openapi.json.

python docs/make_openapi.py           write it
python docs/make_openapi.py --check   exit with status 1 if it is not what would be written
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
KEPT = HERE / "serving" / "openapi.json"


def described() -> str:
    """Of a server of a tiny store: that of any other says the same."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from growlm.engine import Engine
    from growlm.server.app import create_app
    from growlm.server.service import Service
    from growlm.store import Store
    from stores import make_store

    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder), "llama", {})
        with Engine(Store.open(Path(folder) / "store")) as engine:
            return json.dumps(create_app(Service(engine)).openapi(), indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/serving/openapi.json from the server itself.")
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with status 1 if it is stale.")
    check, text = parser.parse_args().check, described()
    if not check:
        KEPT.write_text(text, encoding="utf-8", newline="\n")
        return 0
    if not KEPT.is_file() or KEPT.read_text(encoding="utf-8") != text:
        print(f"{KEPT.name} is not what the server says; run python docs/make_openapi.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
