"""What every command has alike: its help, its exit codes, its settings.

Rules: one paragraph of a docstring is one line of the help, examples stay as they are; what drivers
log is shown on demand alone. Must not come in: any single command, and imports that take time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    import typer

    from shadowsvc.config import Settings

__all__ = ["FAILURE", "INTERRUPTED", "USAGE", "help_text", "register", "tool_settings"]

Command = TypeVar("Command", bound="Callable[..., None]")

FAILURE: Final = 1
USAGE: Final = 2
"""Bad configuration or usage."""
INTERRUPTED: Final = 130


def help_text(doc: str | None, title: str, *lines: str) -> str:
    """Return a command's help: its docstring, one line a paragraph, and lines kept as they are."""
    paragraphs = [" ".join(part.split()) for part in (doc or "").split("\n\n")]
    kept = "\n".join(["\b", title, *(f"  {line}" for line in lines)])  # "\b": click's mark
    return "\n\n".join([*paragraphs, kept])


def register(
    app: typer.Typer, *examples: str, name: str | None = None
) -> Callable[[Command], Command]:
    """Return the decorator of a command whose help ends with examples.

    Args:
        app: to which it belongs.
        examples: one line each.
        name: if it is not that of the function.
    """

    def decorate(command: Command) -> Command:
        text = help_text(command.__doc__, "Examples:", *examples)
        short = text.partition("\n")[0]
        return app.command(name, help=text, short_help=short)(command)

    return decorate


def tool_settings(context: typer.Context) -> Settings:
    """Return the settings of a command that is no service. Raises `ConfigError`.

    What drivers log is shown at the level DEBUG alone: a command tells its one error itself.
    """
    from shadowsvc.config import load_with_origins  # noqa: PLC0415 - on demand

    settings = load_with_origins(config_file=context.obj).settings
    if settings.log.level == "DEBUG":
        from shadowsvc import logs  # noqa: PLC0415 - on demand

        logs.configure(settings.log.level, settings.log.format)
    return settings
