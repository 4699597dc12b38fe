"""Chat templates that do what those of common models do: each with one habit that breaks naive message ranges."""

from __future__ import annotations

from typing import Any

from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

DATED = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '[system]Date: today\n\n' + system + '[end]' }}"
    "{% for message in messages %}"
    "{{ '[' + message['role'] + ']' + message['content'] | trim + '[end]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
"""As Llama's: a system block with the date always comes first, contents are trimmed."""

MERGING = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{% set prefix = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set prefix = '' %}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ (prefix if loop.first else '') + message['content'] | trim + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
"""As Gemma's: the system prompt goes into the first user turn, roles alternate, the assistant is the model."""

INSTRUCTING = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{% if loop.last and tools %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif %}"
    "{{ '[INST]' + (system + '\n\n' if loop.last and system is defined else '') + message['content'] + '[/INST]' }}"
    "{% else %}{{ message['content'] + '</s>' }}{% endif %}{% endfor %}"
)
"""As Mistral's: system prompt and tools stand in the last user turn, wherever that is."""

THINKING = (
    "{% if tools or messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ('\n\n' if tools else '') }}{% endif %}"
    "{% if tools %}{{ '# Tools' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(asked=0) %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in content else '' %}"
    "{% set said = content.split('</think>')[-1].strip() %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.asked and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '\n<call>' + call.function.name + call.function.arguments | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% elif message['role'] == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<result>\n' + content + '\n</result>' }}"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif not (loop.first and message['role'] == 'system') %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen's: reasoning is dropped from earlier turns and opened in the last, tool results share one user turn."""

COUNTING = (
    "{{ messages | length }} messages\n"
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
)
"""Nobody's: what comes first depends on all that follows."""

LAST_ONLY = "{{ messages[-1]['role'] + ': ' + messages[-1]['content'] + '\n' }}"
"""Nobody's: earlier messages are not shown."""

REVERSED = "{% for message in messages[::-1] %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
"""Nobody's: the newest message comes first."""

TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "dated": DATED,
    "merging": MERGING,
    "instructing": INSTRUCTING,
    "thinking": THINKING,
    "counting": COUNTING,
}


def tokenizer_with(template: str) -> Any:
    """The tiny tokenizer with another template; `<s>` marks the beginning, as far as the template writes it."""
    tokenizer = tiny_tokenizer()
    if "bos_token" in template:
        tokenizer.bos_token = "<s>"
    tokenizer.chat_template = template
    return tokenizer
