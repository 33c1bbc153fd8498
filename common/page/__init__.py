"""The browser's part of the page and of the report, and the data that it draws."""
