"""`palimpsest plan`: the memory that a run needs on each GPU, by cause, before anything is started."""
