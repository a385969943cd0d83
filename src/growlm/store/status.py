"""Status: what a store holds, in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from growlm.base import checkpoint
from growlm.disk.files import bytes_in, folders_in
from growlm.progress import track
from growlm.store.stored_module import MANIFEST, StoredModule
from growlm.store.versions import complete_versions

if TYPE_CHECKING:
    from growlm.store.store import Store

REFUSED = "refused"  # in the folder of a run that ended and was not admitted


def status(store: Store) -> dict[str, Any]:
    """What `Store.status` gives."""
    base = checkpoint.num_parameters(store.base_folder)
    found = track(list(store.modules.values()), "reading manifests", "modules")
    modules = [told for _, told in store.read_each(_described, found)]
    sizes = [each["parameters"] for each in modules]
    return {
        "base": store.manifest.base,
        "base_parameters": base,
        "modules": modules,
        "total_parameters": base + sum(sizes),
        "active_parameters": base + max(sizes, default=0),
        "runs": [
            {"folder": str(folder.relative_to(store.path)), "bytes": kept, "refused": (folder / REFUSED).exists()}
            for folder in folders_in(store.work)
            if (kept := bytes_in(folder))
        ],
    }


def _described(module: StoredModule) -> dict[str, Any]:
    versions = complete_versions(module.folder.parent, MANIFEST)
    return {
        "name": module.name,
        "version": module.version,
        "older_versions": [version for version in versions if version < module.version],
        "kind": module.kind,
        "bytes": module.bytes,
        "parameters": module.parameters,
        "about": module.about(),
        "text_bytes": module.text_bytes,
        "holds_text": module.holds_text,
    }
