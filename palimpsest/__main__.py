"""python -m palimpsest COMMAND: the console command, where it is not on the path."""

from palimpsest.cli import main

if __name__ == "__main__":
    main()
