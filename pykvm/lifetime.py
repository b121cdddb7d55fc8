"""What owns an fd or a mapping is a context manager: the ``with`` statement closes it."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ["Closes"]


class Closes:
    """For classes with a ``close()`` that may be called again."""

    __slots__ = ()

    def close(self) -> None:
        """Give back what is owned."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
