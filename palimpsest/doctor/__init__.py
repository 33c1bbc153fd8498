"""Whether this machine can run Palimpsest, and why not.

Standard library only, in the syntax of Python 3.9: it runs before .venv exists, on whatever Python the system has.
"""
