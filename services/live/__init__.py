"""The live view of a run: polls its services and shows their state on the terminal."""
