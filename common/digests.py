"""The form of a blake3 digest in text. Pure."""

import re

HEX_DIGEST = "[0-9a-f]{64}"
"""Pattern of a digest: 64 lower-case hexadecimal digits."""


def is_digest(text: str) -> bool:
    """Whether the text is a digest and nothing else.

    >>> is_digest("c3" * 32), is_digest("C3" * 32), is_digest("c3" * 32 + "\\n")
    (True, False, False)
    """
    return re.fullmatch(HEX_DIGEST, text) is not None
