"""Whether a chat template prints the turns of every role: one that it leaves out would be lost in silence."""

from collections.abc import Mapping, Sequence
from typing import Any

from hft_megatron.data.rendering import Renderer, TemplateError

_USUAL = ("system", "user", "assistant")


class PrintedRoles:
    """Tries every order of roles once: a message's text is changed, and what is rendered must change too."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._known: set[tuple[str, ...]] = set()

    def check(self, messages: Sequence[Mapping[str, Any]], rendered: str) -> None:
        """Raise TemplateError naming the first message whose text isn't in ``rendered``. The assistant's are left to
        the search for what is trained."""
        roles = tuple(message["role"] for message in messages)
        if roles in self._known:
            return
        for number, message in enumerate(messages):
            if message["role"] != "assistant" and self._render_changed(messages, number) == rendered:
                raise TemplateError(
                    f"the chat template doesn't print message {number + 1}, which has the role {message['role']}; use "
                    f"a template that has the role, or remove the message"
                )
        self._known.add(roles)

    def _render_changed(self, messages: Sequence[Mapping[str, Any]], number: int) -> str | None:
        """With another text of one message; None where the template refuses that, so that it does read it."""
        changed = [*messages]
        changed[number] = {**messages[number], "content": f"{messages[number]['content']}x"}
        try:
            return self._renderer.render(changed, add_generation_prompt=False)
        except TemplateError:
            return None


def unusual_roles(messages: Sequence[Mapping[str, Any]]) -> str:
    """What to add to a template's refusal, which may be about these roles; empty without any."""
    found = dict.fromkeys(message["role"] for message in messages if message["role"] not in _USUAL)
    return f" (messages have the role {' and '.join(found)}, which not every template has)" if found else ""
