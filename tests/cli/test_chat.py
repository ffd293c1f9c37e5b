"""generate.py --chat: commands, and in a terminal history and a Ctrl-C that ends the answer only."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, own_cache

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def options(tiny_folder: Path) -> tuple[str, ...]:
    return ("--checkpoint", str(tiny_folder), "--device", "cpu", "--dtype", "fp32", "--chat", "--ignore-eos")


def test_commands(options: tuple[str, ...], tmp_path: Path, invoke: Invoke) -> None:
    lines = ["Hello", "/sparsity 0", "/sparsity 1.5", "/sparsity x", "/nonsense", f"/save {tmp_path / 'c.json'}"]
    lines += [f"/save {tmp_path / 'no' / 'c.json'}", "/save", "/stats", "/reset", "Again", "/quit", "never read"]
    more = ("--sparsity", "0.5", "--max-new-tokens", "5", "--stats")
    code, out, said = invoke(*options, *more, stdin="\n".join(lines))
    assert code == 0, said
    for text in (
        "sparsity 0 from now on",
        "/sparsity 1.5 is out of range",
        "/sparsity x: expected a number",
        "/nonsense is no command",
        "2 messages",
        "error: /save needs a file name",
        '"new_tokens": 5',
        "a new conversation",
    ):
        assert text in said, text
    assert f"error: /save {tmp_path / 'no' / 'c.json'}: No such file or directory" in said and "Traceback" not in said
    saved = json.loads((tmp_path / "c.json").read_text())
    assert [turn["role"] for turn in saved] == ["user", "assistant"] and saved[0]["content"] == "Hello"
    assert said.count("end: length") == 2 and "prompt 3" not in out


@pytest.mark.parametrize("sparsity", ["0", "0.5"])
def test_statistics_change_no_word(options: tuple[str, ...], sparsity: str, invoke: Invoke) -> None:
    """They count by generating once more, and leave the cache as the answer left it."""
    arguments = (*options, "--sparsity", sparsity, "--max-new-tokens", "40")
    lines = "Hello\n/stats\nAgain\n/stats\nOn\n/stats\n"
    (code, text, plain), (other, same, detailed) = (
        invoke(*arguments, *more, stdin=lines) for more in ((), ("--stats",))
    )
    assert code == other == 0 and text == same
    counts = [re.findall(r'"reused_tokens": (\d+)', said) for said in (plain, detailed)]
    assert counts[0] == counts[1] and len(counts[0]) == 3 and int(counts[0][2]) > 40
    assert "cached" not in plain and detailed.count("cached") == 3
    assert ("layer  0" in detailed) == (sparsity != "0") and "GB/s measured" in detailed


def test_a_dense_engine_has_no_other_sparsity(options: tuple[str, ...], invoke: Invoke) -> None:
    code, _, err = invoke(*options, "--max-new-tokens", "2", stdin="/sparsity 0.5\n/sparsity 0\n")
    assert code == 0 and "started dense; start one with --sparsity 0.5" in err
    assert "sparsity 0 from now on" in err


class Terminal:
    """The command in a pseudo-terminal."""

    def __init__(self, options: tuple[str, ...], cache: Path) -> None:
        self.main, other = pty.openpty()
        environment = {"XDG_CACHE_HOME": str(own_cache(cache)), "TERM": "vt100"}
        self.process = subprocess.Popen(
            [sys.executable, "generate.py", *options], cwd=ROOT, stdin=other, stdout=other, stderr=other,
            close_fds=True, start_new_session=True, env=os.environ | environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        os.close(other)
        self.seen = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        os.close(self.main)

    def wait_for(self, text: str, count: int = 1) -> None:
        end = time.monotonic() + 60
        while self.seen.count(text) < count:
            assert time.monotonic() < end, self.seen
            if select.select([self.main], [], [], 0.1)[0]:
                self.seen += os.read(self.main, 4096).decode(errors="replace")

    def wait_for_answer(self) -> None:
        """Until something stands after the message but what the terminal is told."""
        while not re.sub(r"\x1b\[\?2004[hl]|\s", "", self.seen.rpartition("Hello\r\n")[2]):
            self.seen += os.read(self.main, 4096).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())


def test_ctrl_c_stops_the_answer_only(options: tuple[str, ...], tmp_path: Path) -> None:
    with Terminal((*options, "--max-new-tokens", "300"), tmp_path) as terminal:
        terminal.wait_for("> ")
        terminal.type("Hello\n")
        terminal.wait_for("Hello\r\n")
        terminal.wait_for_answer()  # of the answer, all of which takes a quarter of a second
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.wait_for("[stopped]")
        terminal.wait_for("> ", 2)
        terminal.type("/stats\n")
        terminal.wait_for('"finish_reason": "stopped"')
        terminal.type("/quit\n")
        terminal.wait_for("/quit")
        assert terminal.process.wait(20) == 0
        assert (tmp_path / "teal" / "chat" / "history").read_text().splitlines()[-3:] == ["Hello", "/stats", "/quit"]


def test_a_banner_names_help(options: tuple[str, ...], tmp_path: Path) -> None:
    with Terminal(options, tmp_path) as terminal:
        terminal.wait_for("/help lists the commands")
        terminal.wait_for("> ")
        terminal.type("/help\n")
        terminal.wait_for("/sparsity P")


def test_pasted_lines_are_one_message(options: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("readline")
    with Terminal((*options, "--max-new-tokens", "2"), tmp_path) as terminal:
        terminal.wait_for("> ")
        terminal.type("\x1b[200~/one\ntwo\x1b[201~\n")
        terminal.wait_for("> ", 2)
        terminal.type(f"/save {tmp_path / 'c.json'}\n")
        terminal.wait_for("2 messages")
    assert json.loads((tmp_path / "c.json").read_text())[0] == {"role": "user", "content": "/one\ntwo"}


def test_blocks_and_slashes(options: tuple[str, ...], tmp_path: Path, invoke: Invoke) -> None:
    lines = [
        "//etc/hosts",
        '"""',
        "/sparsity",
        "",
        "  indented",
        '"""',
        '"""one line"""',
        '""""""',
        f"/save {tmp_path / 'c.json'}",
    ]
    code, _, err = invoke(*options, "--max-new-tokens", "1", stdin="\n".join([*lines, '"""not', "ended"]))
    assert code == 0, err
    saved = json.loads((tmp_path / "c.json").read_text())
    asked = [turn["content"] for turn in saved if turn["role"] == "user"]
    assert asked == ["/etc/hosts", "/sparsity\n\n  indented", "one line"]


def test_a_message_that_is_too_long_ends_nothing(options: tuple[str, ...], tmp_path: Path, invoke: Invoke) -> None:
    lines = ["first", "x" * 2000, "second", f"/save {tmp_path / 'c.json'}"]
    code, _, err = invoke(*options, "--max-new-tokens", "2", stdin="\n".join(lines))
    assert code == 0, err
    assert "at most 398 fit the model's context of 400" in err
    saved = json.loads((tmp_path / "c.json").read_text())
    assert [turn["content"] for turn in saved if turn["role"] == "user"] == ["first", "second"]


def test_a_full_context_drops_the_oldest_turns_and_keeps_the_system_prompt(
    options: tuple[str, ...], tmp_path: Path, invoke: Invoke
) -> None:
    lines = [f"message {i} " + "lobster " * 8 for i in range(8)]
    more = ("--system", "Be brief.", "--max-new-tokens", "20")
    code, out, err = invoke(*options, *more, stdin="\n".join([*lines, f"/save {tmp_path / 'c.json'}"]))
    assert code == 0, err
    assert "[the context is full: the oldest" in err and "error" not in err
    saved = json.loads((tmp_path / "c.json").read_text())
    assert saved[0] == {"role": "system", "content": "Be brief."}
    asked = [turn["content"] for turn in saved if turn["role"] == "user"]
    assert 1 < len(asked) < 8 and asked == [line.strip() for line in lines[-len(asked) :]]
    assert out.count("\n") >= 8  # every message was answered
