"""`kveraser bench quality` and `kveraser bench sharing`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kveraser.console import bar, emit, print_rows, say
from kveraser.errors import BackboneError, EraserError, InputError
from kveraser.options import DEFAULT_MODEL, SHIPPED, Device, Dtype, EraserOption, Json, Model, load_backbone

if TYPE_CHECKING:
    from kveraser.backbone import Backbone
    from kveraser.methods import Method

METHODS_COMPARED = (
    "mask;shift;zero_value;blank;erratum;repair(32);repair(32, per_span=1.0);selective;follow;kveraser;kveraser+repair"
)
SHOWN = [
    "suite", "task", "length", "span", "method", "cases", "em", "em_exact", "flipped", "recovered", "broken",
    "kl", "fidelity", "leak", "leak_rate",
    "no_harm", "recomputed",
]  # fmt: skip
NEEDS_TEXT, TEXT = "heldout", "wikimedia/wikipedia"

Methods = Annotated[
    str | None, typer.Option(help="Separated by semicolons. Default: all that the backbone and its eraser can serve.")
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same cases and intervals.")]
Corpus = Annotated[str | None, typer.Option(help="Text to fill contexts with: hub dataset, .jsonl file or plain text.")]


def quality(
    suite: Annotated[str | None, typer.Option(help="Names, separated by commas. Default: heldout.")] = None,
    profile: Annotated[str | None, typer.Option(help="A named set of suites and sizes instead: cpu.")] = None,
    cases: Annotated[str | None, typer.Option(help="Cases a cell (default 200), or a .jsonl of your own.")] = None,
    methods: Methods = None,
    tasks: Annotated[str | None, typer.Option(help="Separated by commas. Default: all of the suite.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Context lengths in tokens. Default: the suite's.")] = None,
    spans: Annotated[str | None, typer.Option(help="Span lengths in tokens. Default: the suite's.")] = None,
    corpus: Corpus = None,
    passages: Annotated[int | None, typer.Option(min=2, help="Most passages to read from the corpus.")] = None,
    column: Annotated[str, typer.Option(help="Text column of the corpus.")] = "text",
    dataset: Annotated[
        str | None, typer.Option(help="Questions of longqa: files or hub datasets, separated by commas.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run: a line a case. One that was stopped goes on.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Only go on: --output must hold a run already.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: 1; a profile's own.")] = None,
    seed: Seed = 0,
    model: Model = DEFAULT_MODEL,
    eraser: EraserOption = SHIPPED,
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Measure what every method forgets, leaks and harms, against exact recomputation."""
    from kveraser.bench.plan import PROFILES, QualitySettings, plan_suite, profile_plans
    from kveraser.bench.run import SETTINGS, make_cases, run, to_json, write_result
    from kveraser.bench.suites.file import read_case_file
    from kveraser.bench.workers import most_workers
    from kveraser.training.corpus import read_passages

    if resume and (output is None or not (output / SETTINGS).is_file()):
        raise typer.BadParameter(f"--resume needs a run to go on with, and {output or 'no --output'} holds none")
    count, case_file = None, None
    if cases is not None:
        try:
            count = int(cases)
        except ValueError:
            case_file = Path(cases)
    own_methods = methods
    if profile is not None:
        if suite is not None or case_file is not None or any(one is not None for one in (tasks, lengths, spans)):
            raise typer.BadParameter("--profile sets suites, tasks and sizes itself: leave those options out")
        plans, without = profile_plans(profile, count, dataset)
        own_methods = methods or PROFILES[profile].methods
        workers = workers or most_workers(device)
    else:
        names = [one.strip() for one in (suite or "").split(",") if one.strip()]
        names = names or ([] if case_file is not None else [NEEDS_TEXT])
        given = {"lengths": sizes("--lengths", lengths), "spans": sizes("--spans", spans)}
        chosen_tasks = tuple(task.strip() for task in tasks.split(",")) if tasks is not None else None
        plans = tuple(plan_suite(name, chosen_tasks, **given, cases=200 if count is None else count) for name in names)
        without = ()
    own = read_case_file(case_file) if case_file is not None else ()
    chosen = _chosen(own_methods)
    if corpus is None and any(plan.suite == NEEDS_TEXT for plan in plans):
        corpus = TEXT
    settings = QualitySettings(
        plans,
        seed,
        base(corpus),
        base(dataset),
        None if case_file is None else case_file.name,
    )
    texts = read_passages(corpus, passages, column) if corpus is not None else ()
    backbone = load_backbone(model, eraser, device, dtype)
    served, unserved = serving(chosen, backbone, named=methods is not None)
    made, left_out = make_cases(backbone.tokenizer, settings, texts, own, dataset)
    with bar(total=1.0) as advance:
        measured = run(
            backbone,
            served,
            settings,
            made,
            [*without, *left_out],
            output,
            advance,
            workers or 1,
            partial(load_backbone, model, eraser, device, dtype),
        )
    result = to_json(measured, backbone, settings, served) | {"unserved": unserved}
    if output is not None:
        write_result(output, result)
    if json_output:
        emit(result)
        return
    print_rows("Quality", result["rows"], SHOWN)
    for cell in measured.left_out:
        say(f"Left out: {cell.cell}: {cell.reason}")
    for name, reason in unserved.items():
        say(f"Left out: {name}: {reason}")
    if output is not None:
        say(f"Cases: {output}; look at them with `kveraser bench report {output}`")


def sharing(
    suite: Annotated[str, typer.Option(help="The suite of the sample.")] = "niah",
    cases: Annotated[int, typer.Option(min=1, help="Cases a cell.")] = 1,
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "512",
    methods: Methods = None,
    seed: Seed = 0,
    model: Model = DEFAULT_MODEL,
    eraser: EraserOption = SHIPPED,
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Time measuring many cases and methods on one prefill, against each on its own."""
    from kveraser.bench.plan import QualitySettings, plan_suite
    from kveraser.bench.run import make_cases
    from kveraser.bench.sharing import run, to_json

    plan = plan_suite(suite, lengths=sizes("--lengths", lengths), cases=cases)
    settings = QualitySettings((plan,), seed)
    chosen = _chosen(methods)
    backbone = load_backbone(model, eraser, device, dtype)
    served, _ = serving(chosen, backbone, named=methods is not None)
    made, _ = make_cases(backbone.tokenizer, settings)
    with bar(total=1.0) as advance:
        rows, ratio = run(backbone, served, made, advance)
    named = settings.to_json() | {"methods": [str(method) for method in served]}
    result = to_json(rows, ratio, backbone, named)
    if json_output:
        emit(result)
        return
    print_rows("Sharing", [asdict(row) for row in rows], list(asdict(rows[0])))
    say(f"Sharing is {ratio:.1f} times as fast.")


def _chosen(names: str | None) -> list[Method]:
    """Methods by their names; without names, all that are compared."""
    from kveraser.methods import make_method

    return [make_method(name) for name in (METHODS_COMPARED if names is None else names).split(";") if name.strip()]


def serving(methods: Sequence[Method], backbone: Backbone, named: bool) -> tuple[list[Method], dict[str, str]]:
    """The settled methods, and of those that nobody named the reasons why they can't serve."""
    if named:
        return [method.settled(backbone) for method in methods], {}
    served, unserved = list["Method"](), dict[str, str]()
    for method in methods:
        try:
            served.append(method.settled(backbone))
        except (EraserError, BackboneError) as error:
            unserved[str(method)] = str(error)
    return served, unserved


def sizes(option: str, text: str | None) -> tuple[int, ...] | None:
    """The numbers of an option, separated by commas.

    Raises:
        InputError: anything else.
    """
    if text is None:
        return None
    with suppress(ValueError):
        return tuple(int(size) for size in text.split(","))
    raise InputError(f"{option} {text!r} is not a list of numbers: write it as in 512,1024")


def base(sources: str | None) -> str | None:
    """The names of files or datasets, separated by commas, for the record."""
    if sources is None:
        return None
    return ",".join(Path(one).name if Path(one).is_file() else one for one in map(str.strip, sources.split(",")))
