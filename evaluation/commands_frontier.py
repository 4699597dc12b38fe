"""`python -m evaluation frontier`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evaluation.commands_quality import Corpus
from kveraser.cli.console import bar, emit, say
from kveraser.cli.evaluate import Seed, base, print_run, serving, sizes
from kveraser.cli.options import DEFAULT_MODEL, SHIPPED, Device, Dtype, EraserOption, Json, Model, load_backbone

COMMAND = "python -m evaluation frontier"
SHOWN = ["length", "method", "recomputed", "kl", "kl_low", "kl_high", "fidelity", "cases"]


def frontier(
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "512,2048,7680",
    spans: Annotated[str, typer.Option(help="Span lengths in tokens.")] = "64",
    cases: Annotated[int, typer.Option(min=1, help="Cases of every task, length and span.")] = 4,
    tasks: Annotated[str | None, typer.Option(help="Of suite heldout. Default: all that the text allows.")] = None,
    methods: Annotated[str | None, typer.Option(help="Separated by semicolons. Default: all, at many widths.")] = None,
    corpus: Corpus = None,
    picture: Annotated[Path | None, typer.Option(help="Where to write the figure. Default: into --output.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run: a line a case. A stopped run continues there.")
    ] = None,
    seed: Seed = 0,
    model: Model = DEFAULT_MODEL,
    eraser: EraserOption = SHIPPED,
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Measure KL to exact against tokens run, for every method at several widths and context lengths."""
    from evaluation.frontier import METHODS, SUITE, frontier_rows, make_cases, methods_of, passages_of, tasks_of
    from evaluation.plan import QualitySettings, plan_suite
    from evaluation.report.figures import draw_frontier
    from evaluation.report.write import replace_file
    from kveraser.measure.run import run, to_json, write_result
    from kveraser.training.corpus import read_passages

    chosen_tasks = tuple(task.strip() for task in tasks.split(",")) if tasks is not None else tasks_of(corpus)
    plan = plan_suite(SUITE, chosen_tasks, sizes("--lengths", lengths), sizes("--spans", spans), cases)
    settings = QualitySettings(plans=(plan,), seed=seed, corpus=base(corpus))
    chosen = methods_of(methods or METHODS)
    texts = read_passages(corpus) if corpus is not None else passages_of(seed)
    backbone = load_backbone(model, eraser, device, dtype)
    served, unserved = serving(chosen, backbone, named=methods is not None)
    made = make_cases(backbone.tokenizer, plan, texts, seed)
    with bar(total=1.0) as advance:
        measured = run(backbone, served, settings, made, (), output, advance)
    result = to_json(measured, backbone, settings, served, COMMAND) | {"unserved": unserved}
    result |= {"rows": frontier_rows(result["rows"])}
    if output is not None:
        write_result(output, result)
    target = picture or (None if output is None else output / "frontier.png")
    if target is not None:
        replace_file(target, draw_frontier(result["rows"]).png)
    if json_output:
        emit(result)
        return
    print_run("Frontier", result, SHOWN)
    if target is not None:
        say(f"Picture: {target}")
