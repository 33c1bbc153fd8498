"""Numbers and lists as text for people. Pure."""


def duration(seconds: float) -> str:
    """Return a duration as text.

    >>> duration(8.4), duration(130), duration(7260)
    ('8 s', '2 min 10 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(number: int, thing: str, things: str | None = None) -> str:
    """Return a number with its noun in singular or plural.

    >>> count(1, "version"), count(1200, "version")
    ('1 version', '1,200 versions')
    """
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def listed(names: tuple[str, ...]) -> str:
    """Join names for a sentence.

    >>> listed(("learner",)), listed(("learner", "worker-0", "worker-1"))
    ('learner', 'learner, worker-0 and worker-1')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
