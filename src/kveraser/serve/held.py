"""A context in this process: a session of the library whose last tokens may still wait to be run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kveraser.cache.editable import NO_TOKEN
from kveraser.errors import InputError, SessionError
from kveraser.methods import METHODS
from kveraser.model.decode import text_with_offsets
from kveraser.session.session import Session
from kveraser.session.state import Checkpoint
from kveraser.text import chat
from kveraser.text.tokenized import TokenizedText

ANSWER_ROOM = 64
"""Slots that a context gets beside those of its text, so that an answer rarely moves anything."""
NOTICE_ROOM = 64
"""Slots that the words of a method may take."""


class HeldSession(Session):
    """A session of which the last tokens may not be in the cache yet. Made of a state.

    It takes what `Session` takes, except that its own appends and answers come in steps, for the engine to take.
    """

    # Reading

    @property
    def pending(self) -> int:
        """Live tokens at the end of the transcript that are not in the cache yet."""
        return sum(self.transcript.live) - self.cache.token_count

    @property
    def undo_steps(self) -> int:
        """How many erases, appends and kept answers can be undone."""
        return len(self.state.history)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers for keys and values, and of what undo keeps."""
        return self.cache.bytes_allocated + sum(
            marks.journal.bytes for marks in self.state.history if marks.journal is not None
        )

    def pending_places(self, most: int) -> list[int]:
        """Where the first `most` pending tokens stand in the transcript."""
        live = self.transcript.live
        places: list[int] = []
        place, wanted = len(live), self.pending
        while len(places) < wanted:
            place -= 1
            if live[place]:
                places.append(place)
        return places[::-1][:most]

    # Growing

    def add(self, text: TokenizedText) -> None:
        """Add text to the end, all of it pending.

        Raises:
            ContextLengthError, SessionError: the session is as before.
        """
        self.state.check_idle()
        self.backbone.check_room(self.cache.next_position + self.pending, len(text.tokens))
        marks, transcript, base = self.state.checkpoint(), self.transcript, len(self.transcript.text)
        if transcript.tokens:
            self.state.history.append(marks)
        else:
            transcript.body_start = text.body_start
        transcript.append(text.text, text.tokens, text.offsets)
        transcript.messages += [chat.moved(message, base) for message in text.messages]
        self.state.turn_open = self.turn_open and not text.messages

    def make_room(self, tokens: int) -> None:
        """Room for `tokens` more in the cache; if there is less, for an answer as well."""
        if self.cache.capacity < self.cache.length + tokens:
            self.cache.reserve(self.cache.length + tokens + ANSWER_ROOM)

    def run_pending(self, most: int) -> None:
        """Run the first `most` pending tokens.

        Raises:
            ContextLengthError: the session is as before.
        """
        self.state.check_idle()
        places = self.pending_places(most)
        if places:
            self.make_room(self.pending)
            start = self.cache.length
            self.backbone.extend(self.cache, [self.transcript.tokens[place] for place in places])
            self.cache.set_tokens(start, places)

    # Going back

    def truncate(self, tokens: int) -> None:
        """Forget the transcript from token `tokens` on, with the receipts and undo steps that lie behind it.

        Raises:
            SessionError: there are not so many tokens, or none would remain.
        """
        self.state.check_idle()
        transcript = self.transcript
        if not 0 < tokens <= len(transcript.tokens):
            raise SessionError(f"can't keep {tokens} tokens of {len(transcript.tokens)}: keep from 1 to all of them")
        if tokens == len(transcript.tokens):
            return
        slots = self._slots_of_first(tokens)
        forgotten: list[Checkpoint] = []
        while self.state.history and (
            self.state.history[-1].tokens > tokens
            or (self.state.history[-1].tokens == tokens and self.state.history[-1].journal is None)
        ):
            forgotten.append(self.state.history.pop())
        if forgotten:
            self.state.turn_open = forgotten[-1].turn_open
        if any(marks.journal is not None for marks in forgotten):
            # What lies before an erase that can't be undone can't be reached either.
            self.state.history.clear()
        cut = slots < self.cache.length
        self.cache.truncate(slots)
        if cut and slots and int(self.cache.slot_to_token[-1]) == tokens - 1:
            # An erased span after it may have left a position gap.
            with self.cache.edit():
                self.cache.set_next_position(int(self.cache.positions[-1].floor()) + 1)
        # Several tokens may share the last character.
        characters = max(end for _, end in transcript.offsets[:tokens])
        messages = [message for message in transcript.messages if message.end <= characters]
        transcript.truncate(tokens, characters, 0)
        transcript.messages = messages
        self.receipts[:] = [receipt for receipt in self.receipts if receipt.spans[0][0] < tokens]

    def _slots_of_first(self, tokens: int) -> int:
        """How many slots belong to the first `tokens` of the transcript."""
        held = self.cache.slot_to_token.tolist()
        slots = next((slot for slot, token in enumerate(held) if token >= tokens), len(held))
        if self.transcript.live[tokens - 1]:
            # States in place of a span erased after it go too.
            while slots and held[slots - 1] == NO_TOKEN:
                slots -= 1
        for receipt in self.receipts:
            if receipt.method in METHODS and not METHODS[receipt.method].removes_text:
                # Its notice goes, and with it all that kept the span from being read: later tokens are run again.
                first = receipt.spans[0][0]
                kept = [slot for slot, token in enumerate(held[:slots]) if 0 <= token < first]
                slots = kept[-1] + 1 if kept else 0
        return slots

    def fork(self) -> HeldSession:
        """An independent copy, with undo steps of its own."""
        forked = super().fork()
        forked.state.history = [
            marks if marks.journal is None else replace(marks, journal=marks.journal.copy())
            for marks in self.state.history
        ]
        return forked

    def exact_copy(self) -> HeldSession:
        """The same transcript and receipts, with nothing in the cache yet and nothing to undo."""
        self.state.check_idle()
        cache = self.backbone.new_cache(self.cache.token_count + self.pending + ANSWER_ROOM)
        copy = type(self)(state=self.state.fork(cache))
        copy.state.history.clear()
        return copy

    # Forgetting for good

    def forget_undo(self, keep: int) -> None:
        """Keep only the last `keep` undo steps; what the others held, and unused slots, are overwritten."""
        self.state.check_idle()
        if keep < 0:
            raise InputError(f"can't keep {keep} undo steps: keep 0 or more")
        kept = len(self.state.history) - min(keep, len(self.state.history))
        for marks in self.state.history[:kept]:
            if marks.journal is not None:
                marks.journal.wipe()
        del self.state.history[:kept]
        self.cache.wipe_unused()

    def release(self, wipe: bool) -> None:
        """Let go of all keys and values. With `wipe`, all buffers are overwritten first."""
        self.state.check_idle()
        if wipe:
            self.forget_undo(0)
            self.cache.truncate(0)
            self.cache.wipe_unused()
        self.state.cache = self.backbone.new_cache()
        self.state.history.clear()

    # Answers

    def open_answer(self) -> Checkpoint:
        """Take no other call until `close_answer`; what the session was.

        Raises:
            SessionError: more than the last token is pending, or there is no token to go on from.
            ContextLengthError: no position is left.
        """
        self.state.check_idle()
        if self.pending > 1:
            raise SessionError(f"{self.pending - 1} tokens wait to be run: prefill the context first")
        if not self.pending:
            self._step_back()
        self.backbone.check_room(self.cache.next_position, 1)
        self.state.streaming = True
        return self.state.checkpoint()

    def _step_back(self) -> None:
        """Take the last token out of the cache: an answer begins with the logits behind it."""
        if not self.cache.length or int(self.cache.slot_to_token[-1]) == NO_TOKEN:
            raise SessionError("the context ends in what was erased: append a message or text before an answer")
        length = self.cache.length - 1
        journal = self.state.history[-1].journal if self.state.history else None
        if journal is None:
            self.cache.truncate(length)
        else:
            # Run again its states may differ in the last bit, and undo brings back every bit.
            with self.cache.edit() as step_back:
                self.cache.truncate(length)
            journal.steps += step_back.steps

    def close_answer(self, marks: Checkpoint, tokens: Sequence[int], keep: bool) -> None:
        """End an answer of `tokens`: kept, they are part of the session, and the last of them is pending."""
        if not keep or not tokens:
            self.state.restore(marks)
            self.state.streaming = False
            return
        text, offsets = text_with_offsets(self.backbone.tokenizer, tokens, self.transcript.tokens[-1])
        live, before = self.transcript.live, len(self.transcript.tokens)
        # The answer's first pass ran the last live token.
        last = next(place for place in reversed(range(before)) if live[place])
        if self.cache.length > marks.length + len(tokens):
            self.cache.truncate(marks.length + len(tokens))
        said = [last, *range(before, before + len(tokens))]
        self.cache.set_tokens(marks.length, said[: self.cache.length - marks.length])
        self.transcript.append(text, tokens, offsets)
        self.state.turn_open = False
        self.state.history.append(marks)
        self.state.streaming = False
