"""`palimpsest doctor`: checks whether this machine can run Palimpsest.

Standard library only, in the syntax of Python 3.9, because `make setup` runs it with the Python of the system.
"""
