"""growlm status."""

from __future__ import annotations

from growlm.cli.app import app
from growlm.cli.options import Json, StorePath
from growlm.cli.output import print_json, reports
from growlm.units import counted, format_count, format_size


@app.command()
@reports("store")
def status(store: StorePath, as_json: Json = False) -> None:
    """List a store's modules and their sizes. The last line says how much is active for a prompt.

    Example:

        growlm status brain
    """
    from growlm.store import Store

    found = Store.open(store).status()
    if as_json:
        return print_json(found)
    print(f"base {found['base']}: {format_count(found['base_parameters'])} parameters")
    width = max((len(m["name"]) for m in found["modules"]), default=0)
    for m in found["modules"]:
        older = f" ({counted(len(m['older_versions']), 'older version')})" if m["older_versions"] else ""
        text = f", {format_size(m['text_bytes'])} of text on the disk" if m["text_bytes"] else ""
        text = text or (", samples of text for the router" if m["holds_text"] else "")
        print(
            f"  {m['name']:<{width}}  version {m['version']}{older}  {m['kind']}  {format_size(m['bytes']):>9}  "
            f"{format_count(m['parameters'])} parameters{', ' + m['about'] if m['about'] else ''}{text}"
        )
    for run in found["runs"]:
        what = "is under way or was stopped; the same command goes on"
        if run["refused"]:
            what = "was not admitted; with --admit-anyway its command does"
        print(f"  {run['folder']}  {format_size(run['bytes'])} of a run that {what}")
    print(
        f"total {format_count(found['total_parameters'])} parameters; with the largest module "
        f"{format_count(found['active_parameters'])}"
    )
    return None
