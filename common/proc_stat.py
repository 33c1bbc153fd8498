"""Reads /proc/PID/stat (Linux). Pure."""


def stat_fields(stat: str) -> list[str]:
    """Return the fields after the name, the state first. The name may contain any character, also `)` and spaces.

    >>> stat_fields("7 (a) b)) S 1 7")
    ['S', '1', '7']
    """
    return stat[stat.rindex(")") + 2 :].split()
