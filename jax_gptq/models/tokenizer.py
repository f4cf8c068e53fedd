"""Text <-> tokens, with the files of a checkpoint folder."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers

from jax_gptq.errors import ConfigError, MissingFileError, ModelError


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises MissingFileError, or ModelError where it is no such text."""
    if not path.is_file():
        raise MissingFileError(f"{path}: expected a text file, found no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(
            f"{path}: expected UTF-8 text, found byte {error.object[error.start]:#04x} at offset "
            f"{error.start}; convert the file to UTF-8"
        ) from error


class Tokenizer:
    """`tokenizer.json`, and the chat template where the folder has one.

    Attributes:
      chat_template: a Jinja2 template, or None.
    """

    def __init__(self, path: str | Path):
        """Raises MissingFileError without tokenizer.json, ConfigError if a file is not readable."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise MissingFileError(
                f"{file}: expected the tokenizer of the `tokenizers` package, found no such file"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises plain Exception
            raise ConfigError(f"{file}: not a tokenizer: {error}") from error
        self._config = _read_json(folder / "tokenizer_config.json")
        self.chat_template = _chat_template(folder, self._config)

    def encode(self, text: str) -> list[int]:
        """Token ids, with what the tokenizer adds by itself (a first token, in some families)."""
        return self._tokenizer.encode(text).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """Text without special tokens."""
        return self._tokenizer.decode(list(tokens))

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Messages ({"role": ..., "content": ...}) by the chat template, ready for the answer.

        Raises:
          ModelError: the folder has no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ModelError("this checkpoint has no chat template: pass plain text")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        special = {
            name: _content(value)
            for name, value in self._config.items()
            if name.endswith("_token") and value is not None
        }
        try:
            text = environment.from_string(self.chat_template).render(
                messages=messages, add_generation_prompt=True, **special
            )
        except jinja2.TemplateError as error:
            raise ModelError(f"chat template: {error}") from error
        # The template writes the special tokens itself.
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text piece by piece as tokens come; a character is held back until it is complete."""
        seen: list[int] = []
        shown = ""
        for token in tokens:
            seen.append(token)
            text = self.decode(seen)
            if text.endswith("\N{REPLACEMENT CHARACTER}"):  # the middle of a character
                continue
            yield text[len(shown) :]
            shown = text
            if text.endswith("\n"):  # decode from here on, so that no token costs more than a line
                seen = [token]
                shown = self.decode(seen)
        if seen and (rest := self.decode(seen)[len(shown) :]):
            yield rest


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _content(token: Any) -> str:
    """A special token as written in tokenizer_config.json: text, or an object that holds it."""
    return token["content"] if isinstance(token, dict) else str(token)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: expected JSON: {error}") from error
