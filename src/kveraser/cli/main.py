"""The command line. Results go to stdout, messages and progress to stderr."""

from __future__ import annotations

import codecs
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kveraser.cli.console import RECEIPT_COLUMNS, bar, emit, print_answers, print_document, print_rows, receipt_row, say
from kveraser.cli.evaluate import evaluate
from kveraser.cli.latency import latency
from kveraser.cli.options import (
    DEFAULT_MODEL,
    NO_ERASER,
    SHIPPED,
    Device,
    Dtype,
    EraserOption,
    Json,
    Model,
    eraser_named,
    load_backbone,
    quiet,
)
from kveraser.cli.serve import serve
from kveraser.cli.train import data, train
from kveraser.errors import InputError, KVEraserError, MethodError, extras

if TYPE_CHECKING:
    from kveraser.measure.receipt import Receipt
    from kveraser.model.backbone import Backbone
    from kveraser.session.session import Session
    from kveraser.text.spans import Selector

USAGE, FAILURE = 2, 1
INTERRUPTED = 130
"""Exit code of typer after Ctrl-C."""
# typer vendors click without exporting its usage error; the base class of `BadParameter` is it.
UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="Erase a span of a context from a live KV cache, and measure what was forgotten.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure methods on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(data, name="data")
app.command()(train)
app.command()(serve)
app.command()(evaluate)
bench.command()(latency)

NewTokens = Annotated[int, typer.Option(min=1, help="Maximum number of tokens of an answer.")]

NO_METHOD: tuple[None] = (None,)
SHOWN_TOKENS = 20
"""Number of tokens that `influence` lists for a text."""


def main() -> None:
    """Entry point."""
    run_app(app)


def run_app(commands: typer.Typer) -> None:
    """Run commands with the arguments of this process.

    Errors are printed as one line on stderr; the exit code is 2 for usage errors and 1 for failures.
    """
    try:
        with extras():
            code = commands(standalone_mode=False)
    except MethodError as error:
        _fail(str(error), USAGE)
    except KVEraserError as error:
        _fail(str(error), FAILURE)
    except UsageError as error:
        _fail(error.format_message(), USAGE)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    if code == INTERRUPTED:
        _fail("interrupted: nothing is half-written, and runs that keep a folder go on from there", FAILURE)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"kveraser: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


# Commands


@app.command()
def demo(
    model: Model = DEFAULT_MODEL,
    eraser: EraserOption = SHIPPED,
    picture: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("kveraser-demo.png"),
    json_output: Json = False,
) -> None:
    """Erase a wrong, stale, retracted or malicious span from four documents with every method."""
    from kveraser.demo.documents import load_documents
    from kveraser.demo.picture import draw
    from kveraser.demo.run import run_document, summarize
    from kveraser.methods import METHODS

    backbone = load_backbone(model, eraser)
    results = []
    documents = load_documents()
    with bar(total=len(documents) * (len(METHODS) + 1)) as advance:
        for document in documents:
            result = run_document(backbone, document, list(METHODS), advance)
            results.append(result)
            if not json_output:
                print_document(result)
    summary = summarize(results)
    title = f"Forgetting against cost: {len(results)} documents, {backbone.name}"
    target = draw(summary, picture, title)
    if json_output:
        emit({"rows": summary, "documents": [result.to_json() for result in results], "picture": str(target)})
        return
    print_rows("All documents", summary, ["method", "exact", "seconds", "recomputed", "kl", "fidelity"])
    say(f"Picture: {target}")


@app.command()
def erase(
    context: Annotated[str, typer.Option(help="File with the context, UTF-8; - for standard input.")],
    ask: Annotated[list[str], typer.Option(help="Question to ask before and after; several allowed.")],
    span: Annotated[list[str] | None, typer.Option(help="Text to erase; several allowed.")] = None,
    occurrence: Annotated[int | None, typer.Option(help="Which occurrence of the text, from 1.")] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="Regular expression: every match is erased.")] = None,
    message: Annotated[list[int] | None, typer.Option(help="Index of a message to erase, from 0.")] = None,
    tool_call: Annotated[list[str] | None, typer.Option(help="Id of a tool call whose result to erase.")] = None,
    keep_turn: Annotated[bool, typer.Option("--keep-turn", help="Keep the role markers of erased messages.")] = False,
    messages: Annotated[bool, typer.Option("--messages", help="The context is a JSON list of chat messages.")] = False,
    allow_special: Annotated[
        bool, typer.Option("--allow-special", help="Special tokens in the context act; otherwise they are text.")
    ] = False,
    method: Annotated[list[str] | None, typer.Option(help="Method, such as 'repair(32)'; several allowed.")] = None,
    replace: Annotated[str | None, typer.Option(help="Text that replaces each span.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Budget of method auto, nats per answer token.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Run the named methods even if exact recomputation is as cheap.")
    ] = False,
    audit: Annotated[bool, typer.Option(help="Measure against exact recomputation.")] = True,
    model: Model = DEFAULT_MODEL,
    eraser: EraserOption = SHIPPED,
    device: Device = None,
    dtype: Dtype = None,
    max_new_tokens: NewTokens = 64,
    save: Annotated[Path | None, typer.Option(help="File to save the edited session to (one method only).")] = None,
    json_output: Json = False,
) -> None:
    """Erase or replace spans of a context and answer questions before, after, and by exact recomputation."""
    selectors = _selectors(span, occurrence, pattern, message, tool_call, keep_turn)
    if save is not None and len(method or []) > 1:
        raise typer.BadParameter(f"--save keeps one session, but {len(method or [])} methods are given: name one")
    if force and (not method or "auto" in method):
        raise typer.BadParameter("--force runs the methods that --method names: name them, without auto")
    if max_kl is not None and method != ["auto"]:
        raise typer.BadParameter("--max-kl is the budget of --method auto: name that method, and no other")
    document = _read(context)
    conversation = _parse_messages(document, context) if messages else None
    for name in method or []:
        _check_method(name)
    backbone = load_backbone(model, eraser, device, dtype)
    session = _open(backbone, None if messages else document, conversation, allow_special)
    session.find(selectors)

    def edit(named: str | None, **options: Any) -> Receipt:
        if replace is None:
            return session.erase(selectors, named, **options)
        return session.replace(selectors, replace, named, **options)

    after: list[dict[str, Any]] = []
    receipts: list[dict[str, Any]] = []
    references = exact = None
    with bar() as advance:
        advance("answering before")
        before = _answers(session, ask, max_new_tokens)
        for named in method or NO_METHOD:
            advance(f"erasing: {named or 'default method'}")
            budget: dict[str, Any] = {"max_kl": max_kl, "probes": ask} if named == "auto" else {}
            receipt = edit(named, force=force, **budget)
            answers = _answers(session, ask, max_new_tokens)
            if receipt.exact:
                exact = answers
            elif audit:
                advance("measuring against exact recomputation")
                references = references or session.references()
                session.audit(ask, references=references)
            after.append({"method": session.receipts[-1].method, "answers": answers})
            receipts.append(session.receipts[-1].to_json())
            if save is not None:
                session.save(save)
            session.undo()
        if exact is None:
            advance("answering by exact recomputation")
            edit("recompute")
            exact = _answers(session, ask, max_new_tokens)
    if json_output:
        emit({"before": before, "after": after, "exact": exact, "receipts": receipts})
        return
    print_answers(ask, before, after, exact)
    print_rows("Receipts", [receipt_row(receipt) for receipt in receipts], RECEIPT_COLUMNS)
    for one in receipts:
        if one["reason"] is not None:
            say(f"{one['requested']} became {one['method']}: {one['reason']} (--force runs it anyway)")
    for text in receipts[0]["text"]:
        say(f"Erased: {text!r}")
    for text in receipts[0]["inserted_text"]:
        say(f"Inserted: {text!r}")
    if save is not None:
        say(f"Saved: {save}")


@app.command()
def influence(
    context: Annotated[str, typer.Option(help="File with the context, UTF-8; - for standard input.")],
    span: Annotated[list[str] | None, typer.Option(help="Text whose influence to measure; several allowed.")] = None,
    occurrence: Annotated[int | None, typer.Option(help="Which occurrence of the text, from 1.")] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="Regular expression: every match.")] = None,
    message: Annotated[list[int] | None, typer.Option(help="Index of a message, from 0.")] = None,
    tool_call: Annotated[list[str] | None, typer.Option(help="Id of a tool call whose result to measure.")] = None,
    messages: Annotated[bool, typer.Option("--messages", help="The context is a JSON list of chat messages.")] = False,
    allow_special: Annotated[
        bool, typer.Option("--allow-special", help="Special tokens in the context act; otherwise they are text.")
    ] = False,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Measure how much a span changed each later message, or each later token of a text."""
    selectors = _selectors(span, occurrence, pattern, message, tool_call, False)
    document = _read(context)
    conversation = _parse_messages(document, context) if messages else None
    backbone = load_backbone(model, NO_ERASER, device, dtype)
    session = _open(backbone, None if messages else document, conversation, allow_special)
    with bar(total=1.0) as advance:
        measured = session.influence(
            selectors, progress=lambda done, total: advance(f"scoring {total} tokens", done / total)
        )
    if json_output:
        emit(measured.to_json())
        return
    if messages:
        print_rows(
            "Messages", [asdict(one) for one in measured.messages], ["message", "role", "tokens", "change", "kl"]
        )
    else:
        text, offsets = session.transcript.text, session.transcript.offsets
        most = sorted(measured.tokens, key=lambda one: -one.kl)[:SHOWN_TOKENS]
        rows = [{"token": text[slice(*offsets[one.token])], "change": one.change, "kl": one.kl} for one in most]
        print_rows("Most influenced tokens", rows, ["token", "change", "kl"])
    say(f"Mean over {len(measured.tokens)} later tokens: {measured.kl:.4f} nats per token")


@app.command()
def plan(
    edit_tokens: Annotated[int, typer.Option(min=0, help="Tokens that an edit runs; for recompute, the suffix.")],
    stale_per_turn: Annotated[float, typer.Option(min=0, help="Tokens that become stale in each turn.")],
    turns: Annotated[int, typer.Option(min=1, help="Number of future turns.")],
    stale: Annotated[int, typer.Option(min=0, help="Stale tokens in the context now.")] = 0,
    prefill: Annotated[float, typer.Option(min=0, help="Price or seconds of a token of prefill.")] = 1.0,
    cached: Annotated[float, typer.Option(min=0, help="Price or seconds of a cached token in each turn.")] = 0.1,
    json_output: Json = False,
) -> None:
    """Plan when to edit a growing context: now, every few turns, or never."""
    from kveraser.measure.schedule import best_schedule

    best = best_schedule(prefill * edit_tokens, cached, stale, stale_per_turn, turns)
    if json_output:
        emit(asdict(best))
        return
    costs = {"as planned": best.cost, "no edit": best.cost_never, "an edit every turn": best.cost_always}
    rows = [{"edits": name, "cost": cost} for name, cost in costs.items()]
    print_rows("Costs", rows, ["edits", "cost"])
    if not best.edits:
        say("An edit never pays.")
        return
    say(f"Edit before turns {', '.join(map(str, best.edits))}; turn 0 is the next one.")
    if best.stale is not None:
        say(f"That is whenever {best.stale:.0f} tokens are stale (clear_at_least of the server's context management).")


@app.command()
def ask(
    load: Annotated[Path, typer.Option(help="Session file written by erase --save.")],
    ask: Annotated[list[str], typer.Option(help="Question; several allowed.")],
    model: Annotated[str | None, typer.Option(help="Default: the model named in the file.")] = None,
    eraser: EraserOption = SHIPPED,
    device: Device = None,
    dtype: Dtype = None,
    max_new_tokens: NewTokens = 64,
    json_output: Json = False,
) -> None:
    """Ask a saved session."""
    from kveraser.session.session import Session

    quiet()
    session = Session.load(load, model, eraser=eraser_named(eraser), device=device, dtype=dtype)
    answers = _answers(session, ask, max_new_tokens)
    if json_output:
        emit({"answers": answers, "exact": session.exact, "receipts": [r.to_json() for r in session.receipts]})
        return
    print_rows("Answers", answers, ["question", "answer"])


@app.command()
def methods(json_output: Json = False) -> None:
    """List the erasing methods with their costs and sources."""
    from dataclasses import fields

    from kveraser.methods import METHODS

    rows = [
        {
            "method": name,
            "parameters": {field.name: field.default for field in fields(kind)},  # type: ignore[arg-type]
            "summary": kind.summary,
            "cost": kind.cost,
            "needs_eraser": kind.needs_eraser,
            "source": kind.source,
        }
        for name, kind in METHODS.items()
    ]
    if json_output:
        emit({"rows": rows})
    else:
        print_rows("Methods", rows, ["method", "parameters", "summary", "cost", "source"])


@app.command()
def models(json_output: Json = False) -> None:
    """List the bundled backbone and the tested model families, with the methods that work on each."""
    from kveraser.model.bundled import bundled_status
    from kveraser.model.families import FAMILIES

    rows = [{"model": DEFAULT_MODEL, "kind": "bundled default", "status": bundled_status()}]
    rows += [{"kind": "model_type", **family.row()} for family in FAMILIES]
    if json_output:
        emit({"rows": rows})
    else:
        print(f"{DEFAULT_MODEL} (bundled default): {rows[0]['status']}")
        print_rows("Model families", rows[1:], ["model_type", "products", "layer_types", "works", "limits", "tested"])


# Input


def _selectors(
    span: list[str] | None,
    occurrence: int | None,
    pattern: list[str] | None,
    message: list[int] | None,
    tool_call: list[str] | None,
    keep_turn: bool,
) -> list[Selector | str]:
    from kveraser.text.spans import Message, Pattern, Text, ToolCall

    if occurrence is not None and len(span or []) != 1:
        raise typer.BadParameter(f"--occurrence belongs to one --span, but there are {len(span or [])}")
    if keep_turn and not (message or tool_call):
        raise typer.BadParameter("--keep-turn belongs to --message or --tool-call")
    selectors: list[Selector | str] = [
        *(Text(text, occurrence) for text in span or []),
        *(Pattern(one) for one in pattern or []),
        *(Message(index, keep_turn) for index in message or []),
        *(ToolCall(one, keep_turn) for one in tool_call or []),
    ]
    if not selectors:
        raise typer.BadParameter("say what to erase: --span TEXT, --pattern, --message or --tool-call")
    return selectors


def _read(source: str) -> str:
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise InputError(f"can't read {source} ({error.strerror}): check the path") from error
    try:
        # Some editors write a byte order mark.
        return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        name = "standard input" if source == "-" else source
        raise InputError(
            f"{name} is not UTF-8 (byte {error.start} is {raw[error.start]:#04x}): convert it first"
        ) from error


def _parse_messages(document: str, source: str) -> list[dict[str, Any]]:
    try:
        parsed = json.loads(document)
    except ValueError as error:
        raise InputError(f"{source} is not JSON ({error}): --messages reads a list of chat messages") from error
    if not isinstance(parsed, list):
        raise InputError(
            f"{source} holds {type(parsed).__name__}, not a list: --messages reads a list of chat messages"
        )
    return parsed


def _check_method(name: str) -> None:
    from kveraser.methods import make_method

    if name != "auto":
        make_method(name)


def _open(
    backbone: Backbone, text: str | None, conversation: list[dict[str, Any]] | None, allow_special: bool
) -> Session:
    from kveraser.session.session import Session

    with bar(total=1.0) as advance:
        return Session(
            backbone,
            text=text,
            messages=conversation,
            allow_special=allow_special,
            progress=lambda done, total: advance(f"reading {total} tokens", done / total),
        )


def _answers(session: Session, questions: list[str], max_new_tokens: int) -> list[dict[str, str]]:
    return [
        {"question": question, "answer": session.ask(question, max_new_tokens=max_new_tokens).text}
        for question in questions
    ]
