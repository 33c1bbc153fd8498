"""Joins the scripts and style sheets of this folder into one file that loads no other file.

The modules import each other by relative names, which a file without an address cannot. So the script has them one
after the other, each after those that it imports, without the import and export words.
"""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
_IMPORT = re.compile(r'^import \{[^}]*\} from "\./([a-z]+\.js)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:const|let|class|function)\b)", re.MULTILINE)


def style() -> str:
    """Return the style sheet."""
    return "".join((FOLDER / name).read_text() for name in ("look.css", "live.css"))


def script(entry: str) -> str:
    """Return the module `entry` with all that it imports as one module."""
    found: dict[str, str] = {}

    def add(name: str) -> None:
        if name in found:
            return
        text = (FOLDER / name).read_text()
        for imported in _IMPORT.findall(text):
            add(imported)
        found[name] = _EXPORT.sub("", _IMPORT.sub("", text))

    add(entry)
    return "".join(found.values())


@cache
def live_page() -> tuple[str, str]:
    """Return the HTML of the page of a running learner, and its content security policy."""
    css, code = "\n" + style(), "\n" + script("main.js")
    text = (FOLDER / "page.html").read_text()
    policy = (
        f"default-src 'none'; connect-src 'self'; script-src '{_hash(code)}'; style-src '{_hash(css)}'; "
        f"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.replace("\n/*STYLE*/", css).replace("\n/*SCRIPT*/", code), policy


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
