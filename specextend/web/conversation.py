"""Keeps what was asked about a document and answered, as the prompt of the next question."""

from __future__ import annotations

import uuid

from transformers import PreTrainedTokenizerBase


class Conversation:
    """Holds a document, questions and answers.

    Without a chat template they are one text, which grows token by token: a prompt begins with all
    tokens of the one before and of its answer. With a template the whole is rendered anew, and what
    was kept of the last prompt serves as far as its tokens are the same.

    Args:
        tokenizer: the target's.
        document: its tokens; none of them, where the questions say it all.

    Attributes:
        key: names it for the page.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, document: list[int]):
        self.key = uuid.uuid4().hex
        self._tokenizer, self._document = tokenizer, document
        self._ids, self._messages = document, []
        self._asked: list = []  # the same with the last question, of which one of them is made

    def ask(self, question: str) -> list[int]:
        """Return the prompt with one more question; it counts once it is answered.

        Raises:
            ValueError: there is nothing to be asked or continued.
        """
        has_template, has_words = bool(self._tokenizer.chat_template), bool(question.strip())
        if not self._ids and not (has_template and has_words):
            raise ValueError("The document is empty: paste a text, open a file or choose one.")
        if not has_template:
            self._asked = list(self._ids)
            if has_words:
                text = "\n\n" + question
                self._asked += self._tokenizer(text, add_special_tokens=False).input_ids
            return self._asked
        if not self._messages:
            text = self._tokenizer.decode(self._document, skip_special_tokens=True)
            question = "\n\n".join(part for part in (text, question) if part.strip())
        elif not has_words:
            raise ValueError("There is no question.")
        self._asked = [*self._messages, {"role": "user", "content": question}]
        return self._tokenizer.apply_chat_template(
            self._asked, add_generation_prompt=True, return_dict=True
        )["input_ids"]

    def add(self, answer: list[int]) -> str:
        """Take in the tokens of the answer to the last question, and return its text."""
        count = len(answer)
        while count and answer[count - 1] in self._tokenizer.all_special_ids:  # what ended it
            count -= 1
        text = self._tokenizer.decode(answer[:count], skip_special_tokens=True)
        if self._tokenizer.chat_template:
            self._messages = [*self._asked, {"role": "assistant", "content": text}]
        else:
            self._ids = [*self._asked, *answer[:count]]
        return text
