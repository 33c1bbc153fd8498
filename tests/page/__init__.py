"""The page in a real browser: headless Chromium, which tools.backends.chromium gets into the cache."""
