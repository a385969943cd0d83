"""One file a verb. Each registers its command, in the order of `growlm --help`."""

# isort: off
from growlm.cli.commands import pretrain, new, data, learn, learn_all, grow, router, demo  # noqa: F401
from growlm.cli.commands import route, generate, chat, serve, mcp  # noqa: F401
from growlm.cli.commands import eval, status, verify, withdraw, remove, import_, export, version  # noqa: F401
from growlm.cli.commands import convert, finetune, usage, prune, doctor  # noqa: F401
