"""`python -m evaluation quality`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kveraser.cli.console import bar, emit, say
from kveraser.cli.evaluate import SHOWN, Methods, Seed, base, chosen_methods, print_run, serving, sizes
from kveraser.cli.options import DEFAULT_MODEL, SHIPPED, Device, Dtype, EraserOption, Json, Model, load_backbone

COMMAND = "python -m evaluation quality"
NEEDS_TEXT, TEXT = "heldout", "wikimedia/wikipedia"

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
        Path | None, typer.Option(help="Folder of the run: a line a case. A stopped run continues there.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Only continue: --output must contain a run.")] = False,
    seed: Seed = 0,
    model: Model = DEFAULT_MODEL,
    eraser: EraserOption = SHIPPED,
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Measure what every method forgets, leaks and harms, against exact recomputation."""
    from evaluation.plan import PROFILES, QualitySettings, make_cases, plan_suite, profile_plans
    from kveraser.measure.case_file import read_case_file
    from kveraser.measure.run import SETTINGS, run, to_json, write_result
    from kveraser.training.corpus import read_passages

    if resume and (output is None or not (output / SETTINGS).is_file()):
        raise typer.BadParameter(f"--resume needs a run to continue, and {output or 'no --output'} contains none")
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
    else:
        names = [one.strip() for one in (suite or "").split(",") if one.strip()]
        names = names or ([] if case_file is not None else [NEEDS_TEXT])
        given = {"lengths": sizes("--lengths", lengths), "spans": sizes("--spans", spans)}
        chosen_tasks = tuple(task.strip() for task in tasks.split(",")) if tasks is not None else None
        plans = tuple(plan_suite(name, chosen_tasks, **given, cases=200 if count is None else count) for name in names)
        without = ()
    own = read_case_file(case_file) if case_file is not None else ()
    chosen = chosen_methods(own_methods)
    if corpus is None and any(plan.suite == NEEDS_TEXT for plan in plans):
        corpus = TEXT
    settings = QualitySettings(
        plans=plans,
        seed=seed,
        corpus=base(corpus),
        dataset=base(dataset),
        case_file=None if case_file is None else case_file.name,
    )
    texts = read_passages(corpus, passages, column) if corpus is not None else ()
    backbone = load_backbone(model, eraser, device, dtype)
    served, unserved = serving(chosen, backbone, named=methods is not None)
    made, left_out = make_cases(backbone.tokenizer, settings, texts, own, dataset)
    with bar(total=1.0) as advance:
        measured = run(backbone, served, settings, made, [*without, *left_out], output, advance)
    result = to_json(measured, backbone, settings, served, COMMAND) | {"unserved": unserved}
    if output is not None:
        write_result(output, result)
    if json_output:
        emit(result)
        return
    print_run("Quality", result, SHOWN)
    if output is not None:
        say(f"Cases: {output}; look at them with `python -m evaluation report {output}`")
