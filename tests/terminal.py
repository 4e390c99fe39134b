"""A terminal of some columns: what a program that writes to it leaves on its screen."""

import fcntl
import os
import pty
import re
import struct
import termios
import threading

_PIECE = re.compile(r"\x1b\[(\?)?([\d;]*)([A-Za-z])|\x1b\].*?(?:\x07|\x1b\\)|[\r\n]|[^\x1b\r\n]+", re.S)


class Screen:
    """The lines of a terminal without end, as far as progress bars need one: move up, erase a line, wrap.

    wrapped: lines that were too long and went on in the next one, in their order. text: all that was written.
    """

    def __init__(self, columns: int):
        self.columns, self.lines, self.row, self.column = columns, [""], 0, 0
        self.wrapped: list[str] = []
        self._continued: set[int] = set()
        self.text = ""

    def feed(self, text: str) -> None:
        """Take what a program writes."""
        self.text += text
        for piece in _PIECE.finditer(text):
            private, number, letter = piece.groups()
            if letter == "A" and not private:
                self.row -= int(number or 1)
            elif letter == "K":
                self.lines[self.row] = "" if number == "2" else self.lines[self.row][: self.column]
            elif piece[0] == "\r":
                self.column = 0
            elif piece[0] == "\n":
                self._down()
                self._continued.discard(self.row)
            elif not piece[0].startswith("\x1b"):
                self._print(piece[0])

    def _down(self) -> None:
        self.row += 1
        self.lines += [""] * (self.row + 1 - len(self.lines))

    def _print(self, text: str) -> None:
        for letter in text:
            if self.column == self.columns:
                if self.row not in self._continued:
                    self.wrapped.append(self.lines[self.row])
                self._down()
                self._continued.add(self.row)
                self.column = 0
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + letter + line[self.column + 1 :]
            self.column += 1

    def __str__(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines)


class Terminal:
    """A pseudo-terminal; what is written to `slave`, a descriptor, is in `text` after close()."""

    def __init__(self, columns: int, rows: int = 24):
        self.columns, self.text = columns, ""
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        parts = []
        while True:
            try:
                part = os.read(self.master, 65536)
            except OSError:  # nobody holds the other end any more
                break
            if not part:
                break
            parts.append(part)
        self.text = b"".join(parts).decode()

    def close(self) -> Screen:
        """Read to the end; return the screen."""
        os.close(self.slave)
        self._reader.join()
        os.close(self.master)
        screen = Screen(self.columns)
        screen.feed(self.text)
        return screen
