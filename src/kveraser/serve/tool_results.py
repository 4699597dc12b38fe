"""Which tool results of a conversation go: Anthropic's context editing, decided on messages in the OpenAI format."""

from __future__ import annotations

from dataclasses import dataclass

CLEAR_TOOL_USES = "clear_tool_uses_20250919"


@dataclass(frozen=True)
class ToolResultEdit:
    """One edit of type `clear_tool_uses_20250919`; defaults as Anthropic documents them.

    Attributes:
        trigger_input_tokens: the edit applies when the conversation has more tokens; None: see the other trigger.
        trigger_tool_uses: the edit applies when the conversation has more tool uses.
        keep: tool uses at the end that stay.
        clear_at_least: tokens that must go, else nothing does.
        exclude_tools: names of tools whose results stay.
        clear_tool_inputs: clear the calls' arguments too: all of them, or those of the tools named.
    """

    trigger_input_tokens: int | None = 100_000
    trigger_tool_uses: int | None = None
    keep: int = 3
    clear_at_least: int = 0
    exclude_tools: frozenset[str] = frozenset()
    clear_tool_inputs: bool | frozenset[str] = False
