"""The services. They never import each other: they communicate over the log, the store and HTTP."""
