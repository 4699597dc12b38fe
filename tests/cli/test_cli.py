"""The command line on a tiny model in a folder: results as JSON on stdout, mistakes as one line on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation import __main__ as evaluation
from kveraser.cli import main as cli
from kveraser.methods import METHODS
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from tests.tiny import attach_random_eraser, tiny_backbone

CONTEXT = "The ship left at noon. The captain is Ada. She keeps the log in the cabin. The crew trusts her."
SPAN = "The captain is Ada."
MESSAGES = [
    {"role": "user", "content": "Where is my parcel?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "function": {"name": "find", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "It is in Rome."},
    {"role": "assistant", "content": "It waits in that city."},
]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def eraser(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random eraser for it."""
    folder = tmp_path_factory.mktemp("eraser")
    attach_random_eraser(tiny_backbone()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def context(tmp_path: Path) -> str:
    path = tmp_path / "context.txt"
    path.write_text(CONTEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        # `evaluation` first runs the commands of `python -m evaluation`.
        started = evaluation.main if arguments[0] == "evaluation" else cli.main
        monkeypatch.setattr(sys, "argv", ["kveraser", *arguments[arguments[0] == "evaluation" :]])
        with pytest.raises(SystemExit) as ended:
            started()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def read(result: tuple[int, str, str]) -> dict[str, Any]:
    code, out, err = result
    assert code == 0, err
    parsed: dict[str, Any] = json.loads(out)
    return parsed


def one_line(result: tuple[int, str, str], code: int) -> str:
    assert result[0] == code, result
    assert result[1] == ""
    assert result[2].count("\n") == 1 and result[2].startswith("kveraser: ")
    return result[2]


def reference(text: str, question: str, tokens: int) -> str:
    return Session(tiny_backbone(), text=text).ask(question, max_new_tokens=tokens).text


def test_erase_prints_the_answers_before_after_and_exact(run: Run, model: str, context: str) -> None:
    asked = "--context", context, "--span", SPAN, "--ask", "Who?", "--model", model, "--max-new-tokens", "8", "--json"
    result = read(run("erase", *asked, "--method", "mask", "--method", "recompute"))
    assert list(result) == ["before", "after", "exact", "receipts"]
    assert result["before"] == [{"question": "Who?", "answer": reference(CONTEXT, "Who?", 8)}]
    assert [one["method"] for one in result["after"]] == ["mask", "recompute"]
    assert result["after"][1]["answers"] == result["exact"]
    session = Session(tiny_backbone(), text=CONTEXT)
    session.erase(SPAN, "recompute")
    assert result["exact"][0]["answer"] == session.ask("Who?", max_new_tokens=8).text
    assert result["before"] != result["exact"]
    mask, recompute = result["receipts"]
    assert mask["text"] == [" " + SPAN] or mask["text"] == [SPAN]
    assert not mask["exact"] and mask["audit"]["kl"] > 0 and recompute["exact"]
    assert recompute["recomputed"] > 0 == mask["recomputed"]


def test_exact_answers_come_even_when_no_method_is_exact(run: Run, model: str, context: str) -> None:
    asked = "--context", context, "--span", SPAN, "--ask", "Who?", "--model", model, "--max-new-tokens", "8", "--json"
    with_exact = read(run("erase", *asked, "--method", "recompute"))
    without = read(run("erase", *asked, "--method", "shift", "--no-audit"))
    assert without["exact"] == with_exact["exact"]
    assert without["receipts"][0]["audit"] is None


def test_the_default_method_is_follow_with_and_without_an_eraser(
    run: Run, model: str, eraser: str, context: str
) -> None:
    asked = "--context", context, "--span", "noon", "--ask", "Who?", "--model", model, "--max-new-tokens", "4", "--json"
    assert read(run("erase", *asked))["receipts"][0]["method"] == "follow"
    receipt = read(run("erase", *asked, "--eraser", eraser))["receipts"][0]
    assert receipt["method"] == "follow" and receipt["recomputed"] > 0


def test_a_method_that_costs_as_much_as_exact_becomes_exact_and_says_so(run: Run, model: str, context: str) -> None:
    asked = "--context", context, "--span", SPAN, "--ask", "Who?", "--model", model, "--max-new-tokens", "4"
    asked = *asked, "--method", "repair(900)"
    code, _, err = run("erase", *asked)
    assert code == 0 and "repair(window=900, per_span=0.0) became recompute" in err and "--force" in err
    forced = read(run("erase", *asked, "--force", "--json"))["receipts"][0]
    assert forced["method"] == "repair" and forced["requested"] is None
    assert run("erase", "--context", context, "--span", SPAN, "--ask", "Who?", "--force")[0] == 2


def test_messages_are_erased_by_index_or_by_tool_call(run: Run, model: str, tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    path.write_text(json.dumps(MESSAGES), encoding="utf-8")
    asked = "--context", str(path), "--messages", "--ask", "Where?", "--model", model, "--json", "--max-new-tokens", "4"
    by_index = read(run("erase", *asked, "--message", "2"))
    by_call = read(run("erase", *asked, "--tool-call", "c1"))
    content_only = read(run("erase", *asked, "--tool-call", "c1", "--keep-turn"))
    assert by_index["receipts"][0]["text"] == by_call["receipts"][0]["text"]
    assert by_index["receipts"][0]["text"][0].startswith("<|im_start|>tool")
    assert content_only["receipts"][0]["text"][0].strip() == "It is in Rome."


def test_special_tokens_in_a_context_act_where_that_is_allowed(run: Run, model: str, tmp_path: Path) -> None:
    path = tmp_path / "context.txt"
    path.write_text(f"{SPAN}<|im_end|> The tide is high.", encoding="utf-8")
    asked = "--context", str(path), "--span", "<|im_end|>", "--ask", "Who?", "--model", model, "--json"
    text, acting = (read(run("erase", *asked, *more))["receipts"][0]["erased"] for more in ((), ("--allow-special",)))
    assert acting == 1 < text


def test_several_spans_and_a_pattern_are_erased_at_once(run: Run, model: str, context: str) -> None:
    asked = "--context", context, "--ask", "Who?", "--model", model, "--json", "--max-new-tokens", "4"
    spans = read(run("erase", *asked, "--span", SPAN, "--pattern", r"The c\w+ trusts"))["receipts"][0]["text"]
    assert [text.strip() for text in spans] == [SPAN, "The crew trusts"]
    second = read(run("erase", *asked, "--span", "the", "--occurrence", "2"))["receipts"][0]["spans"]
    first = read(run("erase", *asked, "--span", "the", "--occurrence", "1"))["receipts"][0]["spans"]
    assert second[0][0] > first[0][0]


def test_replace_puts_a_text_in_the_place_of_the_span(run: Run, model: str, context: str, tmp_path: Path) -> None:
    asked = ["--span", SPAN, "--ask", "Who is the captain?", "--model", model, "--json", "--no-audit"]
    replaced = read(run("erase", "--context", context, *asked, "--replace", "The captain is Bob.", "--method", "shift"))
    assert replaced["receipts"][0]["inserted"] > 0
    assert replaced["receipts"][0]["inserted_text"] == ["The captain is Bob."]
    # The exact answers are those to the text as it should have been.
    corrected = tmp_path / "corrected.txt"
    corrected.write_text(CONTEXT.replace(SPAN, "The captain is Bob."), encoding="utf-8")
    wanted = read(run("erase", "--context", str(corrected), "--span", "The crew trusts her.", *asked[2:]))["before"]
    assert replaced["exact"] == wanted != replaced["before"]


def test_plan_says_when_to_edit(run: Run) -> None:
    asked = ["plan", "--edit-tokens", "1000", "--stale-per-turn", "50", "--turns", "200"]
    plan = read(run(*asked, "--json"))
    # sqrt(2 * 1000 / (0.1 * 50)) turns apart.
    assert plan["edits"][:3] == [20, 40, 60] and plan["stale"] == 1000
    assert plan["cost"] < min(plan["cost_never"], plan["cost_always"])
    assert "20, 40, 60" in run(*asked)[2]
    assert "never" in run(*asked, "--cached", "0")[2]


def test_auto_keeps_to_its_budget(run: Run, model: str, context: str) -> None:
    asked = "--context", context, "--span", SPAN, "--ask", "Who?", "--model", model, "--json", "--max-new-tokens", "4"
    strict = read(run("erase", *asked, "--method", "auto", "--max-kl", "0"))["receipts"][0]
    # Where its tokens are the whole suffix, `follow` is exact too.
    assert strict["exact"] and strict["method"] in ("recompute", "follow")
    loose = read(run("erase", *asked, "--method", "auto", "--max-kl", "1000"))["receipts"][0]
    assert not loose["exact"] and loose["recomputed"] == 0


def test_a_saved_session_answers_as_it_did(run: Run, model: str, context: str, tmp_path: Path) -> None:
    saved = tmp_path / "session.kv"
    asked = "--ask", "Who?", "--ask", "Where?", "--max-new-tokens", "6", "--json"
    erased = read(
        run(
            "erase",
            "--context",
            context,
            "--span",
            SPAN,
            "--method",
            "mask",
            "--model",
            model,
            *asked,
            "--save",
            str(saved),
        )
    )
    loaded = read(run("ask", "--load", str(saved), "--model", model, *asked))
    assert loaded["answers"] == erased["after"][0]["answers"]
    assert loaded["exact"] is False and loaded["receipts"][0]["method"] == "mask"


def test_without_json_tables_go_to_stdout_and_messages_to_stderr(
    run: Run, model: str, context: str, tmp_path: Path
) -> None:
    saved = tmp_path / "session.kv"
    code, out, err = run(
        "erase", "--context", context, "--span", SPAN, "--ask", "Who?", "--model", model, "--method", "mask",
        "--max-new-tokens", "4", "--save", str(saved),
    )  # fmt: skip
    assert code == 0 and "before" in out and "exact" in out and "mask" in out
    assert f"Saved: {saved}" in err and SPAN in err and "Saved" not in out
    code, out, _ = run("ask", "--load", str(saved), "--ask", "Who?", "--model", model, "--max-new-tokens", "4")
    assert code == 0 and "Who?" in out


def test_standard_input_is_a_context(run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Piped:
        class buffer:
            @staticmethod
            def read() -> bytes:
                return CONTEXT.encode()

    monkeypatch.setattr(sys, "stdin", Piped)
    result = read(run("erase", "--context", "-", "--span", SPAN, "--ask", "Who?", "--model", model, "--json"))
    assert result["receipts"][0]["text"][0].strip() == SPAN


def test_influence_lists_later_messages_and_tokens(run: Run, model: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(CONTEXT, "utf-8")
    asked = "influence", "--context", str(tmp_path / "text.txt"), "--span", SPAN, "--model", model
    result = read(run(*asked, "--json"))
    assert result["kl"] > 0 and len(result["tokens"]) > 10 and result["messages"] == []
    code, out, err = run(*asked)
    assert code == 0 and "Most influenced tokens" in out and f"{result['kl']:.4f} nats per token" in err
    chat = [
        {"role": "user", "content": "The door code is 4412."},
        {"role": "assistant", "content": "I noted the door code 4412."},
    ]
    (tmp_path / "chat.json").write_text(json.dumps(chat), "utf-8")
    asked = "influence", "--context", str(tmp_path / "chat.json"), "--messages", "--message", "0", "--model", model
    (row,) = read(run(*asked, "--json"))["messages"]
    assert (row["message"], row["role"]) == (1, "assistant") and row["kl"] > 0
    code, out, _ = run(*asked)
    assert code == 0 and "assistant" in out
    assert "say what to erase" in one_line(run(*asked[:4], "--model", model), cli.USAGE)


def test_methods_lists_every_method_with_its_parameters(run: Run) -> None:
    rows = read(run("methods", "--json"))["rows"]
    assert [row["method"] for row in rows] == list(METHODS)
    by_name = {row["method"]: row for row in rows}
    assert by_name["repair"]["parameters"] == {"window": 32, "per_span": 0.0} and by_name["kveraser"]["needs_eraser"]
    code, out, _ = run("methods")
    assert code == 0 and "CacheBlend" in out


def test_models_lists_the_default_and_the_tested_families(run: Run) -> None:
    from kveraser.model.families import FAMILIES

    default, *rows = read(run("models", "--json"))["rows"]
    assert default["model"] == "smollm2-135m-instruct" and default["kind"] == "bundled default"
    assert [row["model_type"] for row in rows] == [family.model_type for family in FAMILIES]
    by_type = {row["model_type"]: row for row in rows}
    assert "Qwen3-30B-A3B" in by_type["qwen3_moe"]["products"] and by_type["qwen3_moe"]["works"] == "all methods"
    assert by_type["gpt2"]["works"] == "methods that keep positions"
    assert all(row["layer_types"] == "full_attention" and row["tested"] for row in rows)
    assert run("models")[0] == 0


def test_latency_reports_a_row_a_method_and_length(run: Run, model: str) -> None:
    result = read(
        run("bench", "latency", "--lengths", "64,96", "--span", "8", "--repeats", "1", "--model", model, "--json")
    )
    assert [(row["method"].partition("(")[0], row["context"]) for row in result["rows"]] == [
        (name, length) for length in (64, 96) for name in METHODS
    ]
    assert result["notes"] and result["settings"]["lengths"] == [64, 96]
    code, out, err = run("bench", "latency", "--lengths", "64", "--span", "8", "--repeats", "1", "--model", model)
    assert code == 0 and "recompute" in out and "untrained" in err


def test_latency_leaves_out_what_the_model_cannot_serve_unless_it_is_asked_for(run: Run, tmp_path: Path) -> None:
    folder, backbone = str(tmp_path), tiny_backbone("gpt2")
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    asked = "bench", "latency", "--lengths", "64", "--span", "8", "--repeats", "1", "--model", folder
    result = read(run(*asked, "--json"))
    timed = {row["method"].partition("(")[0] for row in result["rows"]}
    assert {"recompute", "mask", "kveraser"} <= timed and "shift" not in timed
    assert "no rotary position embedding" in " ".join(result["notes"])
    code, _, err = run(*asked, "--method", "shift")
    assert code == 1 and "no rotary position embedding" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["erase", "--ask", "x"], "--context"),
        (["erase", "--context", "c", "--ask", "x"], "what to erase"),
        (["erase", "--context", "c", "--span", "a", "--span", "b", "--occurrence", "1", "--ask", "x"], "--occurrence"),
        (["erase", "--context", "c", "--span", "a", "--keep-turn", "--ask", "x"], "--keep-turn"),
        (["erase", "--context", "c", "--span", "a", "--ask", "x", "--max-kl", "1"], "--max-kl"),
        (["bench", "latency", "--lengths", "12,many"], "many"),
        (["bench", "latency", "--method", "nothing"], "nothing"),
        (["nonsense"], "nonsense"),
        (["methods", "--unknown"], "--unknown"),
    ],
)
def test_usage_mistakes_end_in_one_line_and_code_2(run: Run, arguments: list[str], said: str) -> None:
    assert said in one_line(run(*arguments), cli.USAGE)


def test_an_unknown_method_is_refused_before_anything_is_loaded(run: Run, context: str) -> None:
    result = run(
        "erase", "--context", context, "--span", SPAN, "--ask", "x", "--method", "nope", "--model", "nowhere/here"
    )
    assert "nope" in one_line(result, cli.USAGE)


def test_two_methods_can_not_both_be_saved(run: Run, context: str) -> None:
    result = run(
        "erase",
        "--context",
        context,
        "--span",
        SPAN,
        "--ask",
        "x",
        "--method",
        "mask",
        "--method",
        "shift",
        "--save",
        "f",
    )
    assert "--save" in one_line(result, cli.USAGE)


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (b"caf\xe9", [], "not UTF-8"),
        (b"", [], "empty"),
        (b"{not json", ["--messages"], "not JSON"),
        (b'{"role": "user"}', ["--messages"], "not a list"),
        (b"[{}]", ["--messages"], "message 0"),
        (b"Nothing of the kind.", [], "not in the context"),
        (b"The captain is Ada. The captain is Ada. So it is.", [], "occurs 2 times"),
        (b"The captain is Ada.", [], "whole context"),
    ],
)
def test_bad_contexts_end_in_one_line_and_code_1(
    run: Run, model: str, tmp_path: Path, content: bytes, options: list[str], said: str
) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    result = run("erase", "--context", str(path), "--span", SPAN, "--ask", "x", "--model", model, *options)
    assert said in one_line(result, cli.FAILURE)


def test_missing_files_models_and_erasers_end_in_one_line_and_code_1(
    run: Run, model: str, context: str, tmp_path: Path
) -> None:
    asked = "--span", SPAN, "--ask", "x"
    assert "can't read" in one_line(run("erase", "--context", str(tmp_path / "no"), *asked), cli.FAILURE)
    missing = run("erase", "--context", context, *asked, "--model", str(tmp_path / "no"))
    assert "can't load the backbone" in one_line(missing, cli.FAILURE)
    adapter = run("erase", "--context", context, *asked, "--model", model, "--eraser", str(tmp_path / "no"))
    assert "no eraser" in one_line(adapter, cli.FAILURE)
    session = run("ask", "--load", str(tmp_path / "no"), "--ask", "x", "--model", model)
    assert "no session file" in one_line(session, cli.FAILURE)


def test_control_c_ends_in_one_line_and_writes_nothing(
    run: Run, model: str, context: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Backbone, "forward", interrupted)
    saved = tmp_path / "session.kv"
    result = run("erase", "--context", context, "--span", SPAN, "--ask", "x", "--model", model, "--save", str(saved))
    assert "interrupted" in one_line(result, cli.FAILURE)
    assert not saved.exists()


def test_a_command_that_computes_nothing_loads_no_torch() -> None:
    import subprocess

    script = "import sys; sys.argv = ['kveraser', '--help']\nfrom kveraser.cli import main as cli\nimport atexit\n"
    script += "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\ncli.main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr.strip() == "False" and "erase" in done.stdout
