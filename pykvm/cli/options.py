"""Options as a table: parsing and help for every command.

argparse would do this, but importing it costs as much as starting Python does, and `pykvm run hello` is measured as a whole process.
"""

from __future__ import annotations

import sys

from pykvm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["Command", "Option", "number", "whole"]


class Option:
    """``--name``: a switch without ``metavar``, else it takes a value, which ``convert`` checks; ``many`` collects values in a list.

    ``--no-name`` is a switch that turns off what is on: its key is ``name``. ``without``: the value where none is given; the next word is
    one only if ``takes(word)``.
    """

    def __init__(
        self,
        name: str,
        help: str,
        metavar: str = "",
        default: Any = None,
        convert: Callable[[str], Any] = str,
        choices: tuple[str, ...] = (),
        many: bool = False,
        without: str | None = None,
        takes: Callable[[str], bool] = lambda word: False,
    ) -> None:
        self.name, self.help, self.metavar, self.convert, self.choices, self.many = name, help, metavar, convert, choices, many
        self.without, self.takes = without, takes
        self.turns_on = not name.startswith("--no-")
        self.default: Any = ([] if many else default) if metavar or choices else not self.turns_on
        if choices:
            self.metavar = "|".join(choices)
        self.key = name.removeprefix("--no-").lstrip("-").replace("-", "_")

    def value(self) -> Any:
        """What counts when nobody gives the option. A default in words, such as 10ms, is read as if it had been given."""
        return list(self.default) if self.many else self.convert(self.default) if isinstance(self.default, str) else self.default

    def value_of(self, text: str) -> Any:
        """The checked value."""
        if self.choices and text not in self.choices:
            raise ConfigError(f"{self.name} {text}: use one of {', '.join(self.choices)}")
        try:
            return self.convert(text)
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{self.name}: {error}") from None


class Command:
    """One command line: ``usage`` operands, a description, options, examples."""

    def __init__(self, name: str, operands: str, about: str, options: list[Option], examples: list[str], rest: bool = False) -> None:
        self.name, self.operands, self.about, self.examples = name, operands, about, examples
        self.options = {option.name: option for option in options}
        self.rest = rest  # everything after -- belongs to somebody else

    def parse(self, argv: list[str], least: int = 0, most: int = 0) -> tuple[list[str], dict[str, Any]]:
        """(operands, option values by name without dashes). Raises ConfigError; prints help and leaves with status 0 for --help."""
        values = {o.key: o.value() for o in self.options.values()}
        operands: list[str] = []
        words = list(reversed(argv))
        while words:
            word = words.pop()
            if word == "--":
                operands += reversed(words)
                break
            if word in ("-h", "--help"):
                print(self.help())
                sys.stdout.flush()
                sys.exit(0)
            if not word.startswith("-") or word == "-":
                operands.append(word)
                continue
            name, equals, value = word.partition("=")
            option = self._find(name)
            if not option.metavar:
                if equals:
                    raise ConfigError(f"{name} takes no value")
                values[option.key] = option.turns_on
                continue
            if not equals and option.without is not None and not (words and option.takes(words[-1])):
                value = option.without
            elif not equals:
                if not words:
                    raise ConfigError(f"{name} needs a value: {name} {option.metavar}")
                value = words.pop()
            if option.many:
                values[option.key].append(option.value_of(value))
            else:
                values[option.key] = option.value_of(value)
        if len(operands) < least:
            raise ConfigError(f"something is missing: pykvm {self.name} {self.operands}; pykvm {self.name} --help tells more")
        if len(operands) > most and not self.rest:
            raise ConfigError(f"{operands[most]!r} is one word too many: pykvm {self.name} {self.operands}")
        return operands, values

    def _find(self, name: str) -> Option:
        if name in self.options:
            return self.options[name]
        from difflib import get_close_matches

        near = get_close_matches(name, self.options, 1)
        hint = f"did you mean {near[0]}?" if near else f"pykvm {self.name} --help lists them"
        raise ConfigError(f"unknown option {name}; {hint}")

    def help(self) -> str:
        """The text of --help."""
        usage = f"pykvm {self.name} {self.operands}".rstrip() + (
            "" if "[OPTIONS]" in self.operands else " [OPTIONS]" if self.options else ""
        )
        lines = [f"usage: {usage}", "", self.about, ""]
        for option in self.options.values():
            left = f"  {option.name} {option.metavar}".rstrip()
            default = f" (default {option.default})" if option.metavar and option.default not in (None, [], "") else ""
            lines.append(f"{left:<34}{option.help}{default}" if len(left) < 33 else f"{left}\n{'':<34}{option.help}{default}")
        if self.examples:
            lines += ["", "examples:"] + [f"  {example}" for example in self.examples]
        return "\n".join(lines)


def number(text: str) -> float:
    """A positive number, such as seconds."""
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a number") from None
    if not 0 < value < 1e9:
        raise ConfigError(f"{text} is out of range: give a positive number")
    return value


def whole(text: str) -> int:
    """A positive whole number."""
    try:
        value = int(text, 0)
    except ValueError:
        raise ConfigError(f"{text!r} is not a whole number") from None
    if value <= 0:
        raise ConfigError(f"{text} is out of range: give a positive number")
    return value
