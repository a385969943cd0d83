"""Task files of lm-evaluation-harness for what the paper evaluates: a YAML file a task, and what the files refer to.

`FOLDER` is what the harness calls an include path; `growlm-lm-eval` adds it by itself.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
