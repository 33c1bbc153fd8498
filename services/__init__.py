"""The services. They never import each other: they meet on the log, in the store and over HTTP."""
