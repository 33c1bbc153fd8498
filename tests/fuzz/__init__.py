"""A fuzzer of the records on the log: mutated records, through the readers of every topic, each accounted for."""
