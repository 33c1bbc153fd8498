"""Small valid records, history lines and run folders for tests to read."""
