"""growlm generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from growlm.cli.app import app
from growlm.cli.asking import module_names, none_because, open_engine, require_looks
from growlm.cli.options import (
    Device,
    ExpertsOn,
    Json,
    MaxNewTokens,
    Memory,
    ModuleChoice,
    RowCache,
    SecondLook,
    Seed,
    StorePath,
    Strict,
    TopP,
)
from growlm.cli.output import name_of, note, print_json, print_stream
from growlm.errors import ConfigError
from growlm.progress import phase, reporting
from growlm.units import format_size

if TYPE_CHECKING:
    from growlm.engine.sources import Quote

_THEIRS = 0.5  # share from which a piece of an answer is told to be a text's
_SHOWN = 60  # characters of it


@app.command()
def generate(
    store: StorePath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", show_default=False)],
    module: ModuleChoice = None,
    memory: Memory = None,
    device: Device = "auto",
    experts_on: ExpertsOn = "memory",
    row_cache: RowCache = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="0 keeps all.")] = 0,
    top_p: TopP = 1.0,
    min_p: Annotated[
        float,
        typer.Option("--min-p", help="Keep tokens at least so many times as likely as the likeliest; 0 keeps all."),
    ] = 0.0,
    presence_penalty: Annotated[
        float, typer.Option("--presence-penalty", help="Off the logit of a token that the answer has; -2 to 2.")
    ] = 0.0,
    frequency_penalty: Annotated[
        float, typer.Option("--frequency-penalty", help="The same, for each time that it has it; -2 to 2.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Of tokens in prompt or answer; above 1 makes them rarer.")
    ] = 1.0,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option("--logit-bias", metavar="ID=NUMBER", help="Added to a token's logit, -100 to 100; repeatable."),
    ] = None,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="With --json: of each token, and of so many others.")
    ] = None,
    number: Annotated[int, typer.Option("--n", help="So many answers, of the seeds from --seed on.")] = 1,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", metavar="FILE", help="The answer is JSON after this schema.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option("--regex", help="The answer matches this regular expression as a whole.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option("--grammar", metavar="FILE", help="The answer is of this grammar, in Lark's syntax.")
    ] = None,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the answer; repeatable.")] = None,
    mix: Annotated[
        int, typer.Option("--mix", help="Let so many of the best modules write together, by how well each predicts.")
    ] = 1,
    reroute: Annotated[
        int, typer.Option("--reroute", help="Choose the module anew after every so many tokens; 0 chooses once.")
    ] = 0,
    sources: Annotated[
        bool, typer.Option("--sources", help="Tell what of the answer stands in the text of a module that recalls.")
    ] = False,
    second_look: SecondLook = False,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Answer a prompt with the module that the router chooses.

    Or with those that are named with --module. The answer is shown as it is written.

    Examples:

        growlm generate brain "What does aspirin inhibit?" --memory 2GB

        growlm generate brain "Article 1." --module law --temperature 0.8 --top-p 0.95 --seed 7

        growlm generate brain "Der Mieter" --module german --module law

        growlm generate brain "The patient sued the hospital because" --mix 2

        growlm generate brain "A notice to quit must" --module law --sources

        growlm generate brain "A patient's record:" --json-schema record.json --repetition-penalty 1.1

        growlm generate brain "Names for a cat:" --n 4 --temperature 0.9 --min-p 0.05

        growlm generate brain "Once upon a time" --module tales --memory 1GB --experts-on disk --row-cache 200MB
    """
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": tuple(stop or ()),
        "min_p": min_p,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "repetition_penalty": repetition_penalty,
        "logit_bias": _biases(logit_bias or ()),
        "logprobs": logprobs,
        "json_schema": _text_of(json_schema, "--json-schema"),
        "regex": regex,
        "grammar": _text_of(grammar, "--grammar"),
    }
    if logprobs is not None and not as_json:
        raise ConfigError("--logprobs are told in JSON; add --json")
    if number != 1 and sources:
        raise ConfigError("--sources are told of one answer; leave out --n")
    wanted = module_names(module)
    require_looks(second_look, mix=mix > 1, reroute=reroute > 0, module=wanted != ["auto"])
    with open_engine(store, memory, device, experts_on, row_cache, strict, wanted, second_look=second_look) as engine:
        if number != 1:
            with reporting(name_of(store)), phase("answering"):
                answers = engine.choices(prompt, number, module=wanted, mix=mix, reroute=reroute, **sampling)
            if as_json:
                return print_json({"choices": [answer.to_json() for answer in answers]})
            for at, answer in enumerate(answers, 1):
                print(f"{at}. {answer.text.strip()}")
            return note(
                f"[{answers[0].module or 'base'}; {format_size(answers[0].resident_bytes)} of weights in memory]"
            )
        if as_json:
            with reporting(name_of(store)), phase("answering"):
                answer = engine.generate(prompt, module=wanted, mix=mix, reroute=reroute, **sampling)
                found = [quote.to_json() for quote in engine.sources(prompt, answer)] if sources else None
            return print_json(answer.to_json() | ({} if found is None else {"sources": found}))
        pieces = engine.stream(prompt, module=wanted, mix=mix, reroute=reroute, **sampling)
        result = print_stream(pieces, name_of(store))
        quotes = engine.sources(prompt, result) if sources else None
    if not result.text.strip() and result.finish_reason == "stop" and not stop:
        note("the model ended the text at once; a question is best asked with growlm chat")
    writers = result.module or "base"
    if result.mixture:
        writers = ", ".join(f"{name} {share:.0%}" for name, share in result.mixture.items())
    elif len(result.changes) > 1:
        writers = ", ".join(f"{name or 'base'} from token {at}" for at, name in result.changes)
    elif not result.module and wanted == ["auto"] and len(result.scores) > 1:
        writers = f"base: {none_because(result.refused)}; name one with --module to have it all the same"
    note(
        f"[{writers}; {format_size(result.resident_bytes)} of weights in memory"
        f"{'; loaded ' + ', '.join(result.loaded) if result.loaded else ''}]"
    )
    if quotes is not None:
        for line in _told(quotes):
            note(line)
    return None


def _biases(given: Sequence[str]) -> dict[str, float]:
    """
    Raises:
        ConfigError: something that is not ID=NUMBER.
    """
    biases = {}
    for item in given:
        token, equals, bias = item.partition("=")
        try:
            biases[token.strip()] = float(bias)
        except ValueError:
            equals = ""
        if not equals or not token.strip().isdecimal():
            raise ConfigError(f"--logit-bias {item!r}: write it as ID=NUMBER, e.g. 464=-5")
    return biases


def _text_of(path: Path | None, option: str) -> str | None:
    """
    Raises:
        ConfigError: the file cannot be read as text.
    """
    if path is None:
        return None
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError(f"{option} {path}: {why}; give a text file") from None


def _told(quotes: Sequence[Quote]) -> list[str]:
    """For people: what is the text's rather than the model's own."""
    theirs = [quote for quote in quotes if quote.share >= _THEIRS and quote.text.strip()]
    if not theirs:
        return ["sources: none of it is from a module's text"]
    return ["sources:"] + [
        f"  {_cut(quote.text)!r}: {quote.module}, {_plain(quote.source)}, character {quote.character:,} "
        f"({quote.share:.0%})"
        for quote in theirs
    ]


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _plain(source: str) -> str:
    """A source's name, which may be another person's choice, as a terminal can show it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in source)
