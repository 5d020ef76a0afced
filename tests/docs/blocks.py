"""The code blocks of a page of the documentation, run in order as a reader would.

`python` runs, all blocks of a page in one namespace; with `title="recipe.py"` it is written to that
file instead. `console` holds commands after `$ `, and their whole output, in which `...` stands for
anything; `sh` holds commands without output. A comment before a block may say more:

    <!-- slow -->             it starts workers or takes long: run by `make test-docs` only
    <!-- needs: package -->   it is left out where the package is not installed
    <!-- exit code: 2 -->     with which its commands end
    <!-- ranks: 2 -->         a script for as many ranks, under torchrun (slow)
    <!-- not run: why -->     it is not run
"""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stagewise.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("python", "console", "sh")
ALL = "STAGEWISE_ALL_DOCS"  # run slow blocks, too
_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<note>[^>]*?) -->\n+)?"
    r"^(?P<indent> *)```(?P<info>\w+[^\n]*)\n(?P<text>.*?)^ *```",
    re.MULTILINE | re.DOTALL,
)
_SECONDS = 300


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: its language and title, what its comment says, its text and first line."""

    language: str
    title: str | None
    notes: Mapping[str, str]
    text: str
    line: int

    @property
    def left_out(self) -> bool:
        """Whether this run passes it over."""
        slow = {"slow", "ranks"} & self.notes.keys()
        needs = self.notes.get("needs", "")
        missing = [name for name in needs.split() if importlib.util.find_spec(name) is None]
        return "not run" in self.notes or bool(missing) or (bool(slow) and ALL not in os.environ)


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page that have a language which runs."""
    content = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(content):
        language, _, info = found["info"].partition(" ")
        if language not in RUN:
            continue
        title = re.search(r'title="([^"]+)"', info)
        notes = (part.partition(":") for part in (found["note"] or "").split(","))
        text = re.sub(rf"^{found['indent']}", "", found["text"], flags=re.MULTILINE)
        yield Block(
            language=language,
            title=title[1] if title else None,
            notes={name.strip(): value.strip() for name, _, value in notes if name.strip()},
            text=text,
            line=content[: found.start("text")].count("\n") + 1,
        )


def run_page(page: Path, folder: Path) -> int:
    """Run a page's blocks in `folder`, which is the working directory; return how many ran."""
    (folder / "examples").symlink_to(ROOT / "examples")
    namespace: dict[str, object] = {"__name__": "__main__"}
    number = 0
    for block in blocks_of(page):
        if block.title is not None:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.text)
        elif not block.left_out:
            number += 1
            try:
                _run(block, page, namespace)
            except BaseException as error:
                error.add_note(f"in {page.relative_to(ROOT)}, line {block.line}")
                raise
    return number


def _run(block: Block, page: Path, namespace: dict[str, object]) -> None:
    if "ranks" in block.notes:
        script = Path(f"line_{block.line}.py")
        script.write_text(block.text)
        _command(f"torchrun --nproc-per-node {block.notes['ranks']} {script}")
    elif block.language == "python":
        code = "\n" * (block.line - 1) + block.text
        exec(compile(code, str(page), "exec"), namespace)
    else:
        for command, expected in _commands(block):
            said = _command(command, int(block.notes.get("exit code", 0)))
            assert expected is None or _alike(said, expected), f"$ {command}\n{said}"


def _commands(block: Block) -> Iterator[tuple[str, str | None]]:
    """Yield each command with its output, None if the page does not show it."""
    if block.language == "sh":
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.split("#")[0].strip():
                yield line.split("  #")[0], None
        return
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output if output.strip() else None


def _command(text: str, code: int = 0) -> str:
    """Run a command; return what it prints. stagewise runs here, as torch's import takes long."""
    words = shlex.split(text)
    if words[0] == "stagewise" and ALL not in os.environ:
        return _here(words, code)
    where = Path(sys.executable).parent
    program = [str(where / words[0]), *words[1:]] if (where / words[0]).exists() else words
    done = subprocess.run(
        program,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert done.returncode == code, f"$ {text}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def _here(words: list[str], code: int) -> str:
    before, said = sys.argv, io.StringIO()
    sys.argv = words
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main()
    except SystemExit as ended:
        assert (ended.code or 0) == code, f"$ {shlex.join(words)}\n{said.getvalue()}"
    finally:
        sys.argv = before
    return said.getvalue()


def _alike(said: str, expected: str) -> bool:
    """Whether an output is the one shown, in which `...` alone on a line or in it is anything."""
    lines = [re.escape(line.rstrip()) for line in expected.strip("\n").splitlines()]
    pattern = "\n" + "\n".join(lines).replace(r"\.\.\.", ".*") + "\n"
    told = "\n" + "\n".join(map(str.rstrip, said.strip("\n").splitlines())) + "\n"
    return re.fullmatch(pattern.replace("\n.*\n", "\n(?:.*\n)*"), told) is not None
