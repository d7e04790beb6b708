"""Lines of standard input, and a conversation over them."""

import json
import signal
import sys
from contextlib import suppress
from pathlib import Path

from tinygpt import checkpoint
from tinygpt.inference.chat import Conversation
from tinygpt.training.signals import pending_signals

PROMPT = "> "
HELP = """\
/reset      begin a new conversation
/save FILE  write this one into a new file, as a line that train.py --data takes from a .jsonl file
/help       show this list
Every other line is a message. Ctrl-C stops an answer, Ctrl-D ends the command."""


def put(text: str) -> None:
    """Writes text to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def notify(line: str) -> None:
    """Prints a line for the user, not for a program that reads stdout."""
    print(line, file=sys.stderr, flush=True)


def read_line() -> str:
    """The next line of standard input with its line break, or "" at its end.

    A terminal gets a prompt, and line editing with a history if Python has readline. The prompt is
    written to stdout only if that is the terminal too.
    """
    if not sys.stdin.isatty():
        return sys.stdin.readline()
    if not sys.stdout.isatty():
        print(PROMPT, end="", file=sys.stderr, flush=True)
        return sys.stdin.readline()
    with suppress(ImportError):
        import readline  # noqa: F401 - input() edits lines by it
    try:
        return input(PROMPT) + "\n"
    except EOFError:
        put("\n")
        return ""


def talk(conversation: Conversation) -> None:
    """Answers the lines of standard input on stdout until it ends; see HELP."""
    while True:
        try:
            if not (line := read_line()):
                return
            _take(conversation, line.strip())
        except ValueError as error:
            notify(str(error))
        except KeyboardInterrupt:  # while a line is typed, or a second time during an answer
            if not sys.stdin.isatty():
                raise
            put("\n")


def _take(conversation: Conversation, line: str) -> None:
    if line.startswith("/"):
        notify(_obey(conversation, line))
    elif line:
        _answer(conversation, line)


def _answer(conversation: Conversation, text: str) -> None:
    """Prints the answer to a message while it is sampled, until Ctrl-C."""
    before = conversation.forgotten
    with pending_signals((signal.SIGINT,), "") as pending:
        for piece in conversation.say(text):
            put(piece)
            if pending:
                break
    put("\n")
    if conversation.is_cut:
        notify("the answer is cut off at its maximum length")
    if count := conversation.forgotten - before:
        turns = "oldest turn is" if count == 1 else f"{count} oldest turns are"
        notify(f"the context is full: the {turns} forgotten")


def _obey(conversation: Conversation, line: str) -> str:
    """Does what a command says; returns a line about it. Raises ValueError."""
    command, _, argument = line.partition(" ")
    match command, argument.strip():
        case "/help", "":
            return HELP
        case "/reset", "":
            conversation.reset()
            return "a new conversation begins"
        case "/save", "":
            raise ValueError("/save needs the name of a new file: /save chat.jsonl")
        case "/save", name:
            save(conversation.messages, Path(name))
            return f"saved in {name}"
        case ("/help" | "/reset"), _:
            raise ValueError(f"{command} takes nothing after it: leave it out")
    raise ValueError(f"there is no command {command}: /help lists them")


def save(messages: list[dict], path: Path) -> None:
    """Writes a conversation as a line of JSON, atomically. Raises ValueError where nothing was
    said, or where the file exists or cannot be written."""
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("nothing was said yet: there is nothing to save")
    if path.exists():
        raise ValueError(f"{path} already exists: name a new file")
    line = json.dumps({"messages": messages}, ensure_ascii=False)
    checkpoint.write_atomically(path, f"{line}\n".encode())
