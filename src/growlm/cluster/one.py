"""One: a process that learns one module of a plan, which comes as a line of JSON on its standard input."""

from __future__ import annotations

import json
import os
import sys

from growlm.errors import GrowlmError, Interrupted
from growlm.following import end_with_parent
from growlm.store import Store
from growlm.training.config import LearnConfig
from growlm.training.learn import learn


def main() -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    asked = json.loads(sys.stdin.readline())
    end_with_parent()
    try:
        config = LearnConfig(**asked["settings"])
        result = learn(Store.open(asked["store"]), asked["name"], asked["data"], config, update=asked["update"])
    except (Interrupted, KeyboardInterrupt):
        return 130
    except GrowlmError as error:
        print(f"growlm: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result.to_json()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
